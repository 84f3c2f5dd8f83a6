"""`longvita demo`: the main job in small, on real input. Exit code 1 when something was not learned; the report says what."""

from __future__ import annotations

import argparse
import sys

from longvita.cli import errors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        f"{parser.description}\n\nBy default: 8K tokens of context, about 10 minutes on two cores; an estimate for this machine is printed "
        "first.\nExit code 1 if something was not learned or a control failed; the report says what."
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a first look: 2K tokens of context, a few minutes")
    size.add_argument("--full", action="store_true", help="8K tokens of context, about twice the training steps and questions")
    parser.add_argument(
        "--out", default="demo-out", metavar="DIR", help="where everything goes; the same command resumes (default: demo-out)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of data and weights (default: 0)")


def seed(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    from longvita.demo.plan import make_plan
    from longvita_kernels import backends, native

    native.load(), backends.requested()  # what LONGVITA_ISA and LONGVITA_BACKEND say is checked before the directory is claimed
    name = "quick" if args.quick else "full" if args.full else "default"
    plan = make_plan(name, args.seed)
    from longvita.demo.report import lines
    from longvita.demo.run import Demo

    tell = (lambda line: None) if args.quiet else (lambda line: print(line, file=sys.stderr, flush=True))
    demo = Demo(plan, args.out, seed=args.seed, progress="quiet" if args.quiet else "auto", tell=tell)
    report = demo.run()
    print("\n".join(lines(report, demo.out)))
    return errors.OK if all(report["learned"].values()) and not report["above_chance"] else errors.FAILED
