"""`longvita chat`: ask a trained model about images, videos and text; one question with --prompt, otherwise a conversation."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from longvita.cli.errors import FAILED, OK, WRONG_INPUT, UsageError

HELP = """\
/image PATH   add an image to the next question      /text PATH   add a text file to the next question
/video PATH   add a video to the next question       /reset       forget the conversation
/exit         leave (or Ctrl-D)                      Ctrl-C       stop an answer"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, metavar="DIR", help="a run directory, or a demo's --out directory (its last stage)")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="show this image before the question (repeatable)")
    parser.add_argument("--video", action="append", default=[], metavar="FILE", help="show this video, or directory of frames (repeatable)")
    parser.add_argument("--text-file", action="append", default=[], metavar="FILE", help="put this text before the question (repeatable)")
    parser.add_argument("--prompt", help="ask this one question, print the answer and exit")
    parser.add_argument("--system", help="a system message (default: none, as in training)")
    parser.add_argument("--media-root", metavar="DIR", help="read images and videos below this directory only")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): always the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest tokens of this total probability")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens (default: 0, all)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: say the same less often (default: 1)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text (repeatable)")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")
    parser.add_argument("--device", help="cpu, cuda, … (default: where the weights fit: cpu)")


def run(args: argparse.Namespace) -> int:
    # Before the model is loaded: a mistyped path should not cost the time that takes.
    named = [("image", args.image), ("video", args.video), ("text", args.text_file)]
    parts = [media_part(kind, path, args.media_root) for kind, paths in named for path in paths]
    chat = Chat(args)
    if args.prompt is not None:
        chat.ask(parts, args.prompt)
        return OK
    return converse(chat, parts, quiet=args.quiet)


def media_part(kind: str, path: str, root: str | None = None) -> dict[str, Any]:
    """A content part for a file named by the user. UsageError when it is not there."""
    if kind == "text":
        try:
            return {"type": "text", "text": Path(path).read_text(encoding="utf-8") + "\n"}
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: expected a text file in UTF-8, got other bytes at position {error.start}") from error
        except OSError as error:
            raise UsageError(f"{path}: cannot read this text file: {error.strerror}") from error
    if not (Path(root or ".") / path).exists():
        raise UsageError(f"{path}: no such {kind} file{f' below {root}' if root else ''}")
    return {"type": kind, kind: path}


class Chat:
    """A model and the conversation so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        import longvita
        from longvita.cli.runs import last_stage

        self.model, self.processor = longvita.load(last_stage(args.run), device=args.device)
        if args.media_root is not None:
            self.processor.limits = dataclasses.replace(self.processor.limits, root=args.media_root)
        self.system = [{"role": "system", "content": args.system}] if args.system else []
        self.options = {
            "max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k,
            "repetition_penalty": args.repetition_penalty, "stop": tuple(args.stop), "seed": args.seed,
        }  # fmt: skip
        self.media_root = args.media_root
        self.reset()

    def reset(self) -> None:
        self.messages = list(self.system)

    def ask(self, parts: list[dict[str, Any]], question: str) -> None:
        """Print the answer piece by piece. Question and answer become part of the conversation, unless there was no answer."""
        import longvita

        asked = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
        answer = ""
        pieces = longvita.generate(self.model, self.processor, [*self.messages, asked], **self.options)
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
                answer += piece
        finally:
            print(flush=True)
            if answer.strip():  # the schema knows no blank answers
                self.messages += [asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def converse(chat: Chat, parts: list[dict[str, Any]], *, quiet: bool) -> int:
    """Read questions and commands until /exit or the end of the input. A mistake costs one message, not the conversation.

    From a terminal: exit code 0. From a pipe or file: that of the first line that failed, because nobody was there to see it.
    """
    interactive = sys.stdin.isatty() and not quiet
    if interactive:
        import readline  # noqa: F401

        # input() now edits lines and remembers them.
        print(HELP)
    code, waiting = OK, list(parts)
    while True:
        try:
            line = input("\nyou: " if interactive else "").strip()
        except EOFError:
            return OK if interactive else code
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("\n(/exit or Ctrl-D leaves)")
            continue
        try:
            if line == "/exit":
                return OK if interactive else code
            if line.startswith("/"):
                command(chat, waiting, line, quiet)
            elif line:
                chat.ask(waiting, line)
                waiting.clear()
        except KeyboardInterrupt:
            if not interactive:
                raise
            waiting.clear()
        except (ValueError, RuntimeError) as error:
            print(f"longvita chat: {error}", file=sys.stderr, flush=True)
            waiting.clear()
            code = code or (WRONG_INPUT if isinstance(error, ValueError) else FAILED)


def command(chat: Chat, waiting: list[dict[str, Any]], line: str, quiet: bool) -> None:
    """One line that starts with a slash. UsageError for one that is unknown."""
    name, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    if name in ("image", "video", "text"):
        if not rest:
            raise UsageError(f"/{name} needs the path of a file, for example: /{name} file")
        waiting.append(media_part(name, rest, chat.media_root))
        if not quiet:
            print(f"({rest} goes with the next question)")
    elif name == "reset":
        chat.reset()
        waiting.clear()
    elif name == "help":
        print(HELP)
    else:
        raise UsageError(f"unknown command /{name}; known: /image /video /text /reset /help /exit")
