"""`longvita COMMAND …`: one module per subcommand, each imported only when it is called, so that --help needs nothing but Python.

A subcommand's module has `add_arguments(parser)`, which imports nothing heavy, and `run(args)`, which returns an exit code (None is 0).
What it raises becomes one message (see errors.py); a KeyboardInterrupt with a text says what is saved and how to go on.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence
from typing import NamedTuple

from longvita.cli.errors import INTERRUPTED, OK, Boundary
from longvita.threads import keep_to_quota, set_wait_policy


class Command(NamedTuple):
    """One subcommand: its line in `longvita --help`, and the command to paste at the end of its own."""

    help: str
    example: str


COMMANDS = {
    "demo": Command(
        "train a tiny Long-VITA through all four stages on real data, then ask it questions",
        "longvita demo --quick --out demo-quick",
    ),
    "train": Command("train from a run-config JSON, or go on with a run that was stopped", "longvita train run.json --out runs/mine"),
    "chat": Command(
        "ask a trained model about images, videos and text",
        'longvita chat --run demo-out --image demo-out/material/images/held_out/0007.jpg --prompt "Which digit is this?"',
    ),
    "eval": Command(
        "measure a trained model: the needle in long videos and texts",
        "longvita eval needle demo-out --kind both --out needle.json",
    ),
    "plot": Command("draw the loss curves of one or several run directories", "longvita plot demo-out --out loss.png"),
    "doctor": Command("say what is installed, what is missing and why", "longvita doctor"),
    "config": Command("show, compare and check models, recipes and run configurations", "longvita config show 14b"),
}


def add_command(subparsers: argparse._SubParsersAction, name: str, command: Command) -> argparse.ArgumentParser:
    """A subcommand's parser (or, inside a subcommand, an action's): its help ends with the example; the common options are there."""
    parser = subparsers.add_parser(
        name,
        help=command.help,
        description=f"{command.help[0].upper()}{command.help[1:]}.",
        epilog=f"example:\n  {command.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # No defaults here: those of an inner parser would overwrite what an outer one has read.
    parser.add_argument("--quiet", action="store_true", default=argparse.SUPPRESS, help="print results and errors only")
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error")
    return parser


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser; only `command`'s own arguments are added, because only its module is imported."""
    parser = argparse.ArgumentParser(
        prog="longvita",
        description="Train and run Long-VITA models: images, hours of video and long text in one context.",
        epilog="example:\n  longvita demo --quick --out demo-quick",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.set_defaults(quiet=False, debug=False)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, entry in COMMANDS.items():
        subparser = add_command(subparsers, name, entry)
        if name == command:
            importlib.import_module(f"longvita.cli.{name}").add_arguments(subparser)
    return parser


def version() -> str:
    """The installed version, from the package's metadata."""
    from importlib import metadata

    try:
        return metadata.version("longvita")
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"


def entry() -> int:
    """The console script: `main`, after which a second Ctrl-C does not disturb the exit of an interrupted command."""
    code = main()
    if code == INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    set_wait_policy()  # both have an effect only before a subcommand imports torch
    keep_to_quota()
    argv = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in argv if not word.startswith("-")), None)
    with Boundary(command or "", debug="--debug" in argv) as boundary:
        parser = build_parser(command)
        args = parser.parse_args(argv)
        if args.version:
            print(f"longvita {version()}")
            return OK
        if args.command is None:
            parser.print_help()
            return OK
        module = importlib.import_module(f"longvita.cli.{args.command}")
        return module.run(args) or OK
    return boundary.code
