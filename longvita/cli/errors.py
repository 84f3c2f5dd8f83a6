"""How an exception becomes one message and an exit code: 0 done, 1 failed while running, 2 wrong usage or input, 130 interrupted."""

from __future__ import annotations

import os
import re
import sys
import traceback
from importlib import metadata
from types import TracebackType

OK, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130

INTERRUPTED_HINT = "what was saved before stays as it is; run the same command again"

# Import names that differ from the name the package is installed by.
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}


class UsageError(ValueError):
    """The caller asked for something that cannot be: says what was expected, what came, and the remedy."""


def extras() -> dict[str, set[str]]:
    """{extra: distributions it brings} from the installed package's own metadata; empty when it is not installed."""
    try:
        requirements = metadata.requires("longvita") or []
    except metadata.PackageNotFoundError:
        return {}
    found: dict[str, set[str]] = {}
    includes: list[tuple[str, str]] = []  # (extra, extra that it takes in: "longvita[plot,video]")
    for requirement in requirements:
        name, inner = re.match(r"([A-Za-z0-9._-]+)(?:\[([^\]]*)\])?", requirement).groups()
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", requirement)
        if extra and inner and canonical(name) == "longvita":
            includes += [(extra[1], part.strip()) for part in inner.split(",")]
        elif extra:
            found.setdefault(extra[1], set()).add(canonical(name))
    for _ in includes:  # deep enough for any chain
        for outer, part in includes:
            found.setdefault(outer, set()).update(found.get(part, ()))
    return found


def canonical(distribution: str) -> str:
    """Distribution names compare without case, and with - _ . alike (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def missing_module(module: str) -> str:
    """The message for a module that cannot be imported, with the command that brings it."""
    top = module.partition(".")[0]
    wanted = canonical(DISTRIBUTIONS.get(top, top))
    if top in {"longvita", "longvita_kernels"}:
        return f"this installation has no module {module!r}: install longvita again with: pip install --force-reinstall longvita"
    brings = extras()
    # The smallest extra that has it: "video" rather than "demo".
    holders = sorted((name for name in brings if wanted in brings[name]), key=lambda name: (len(brings[name]), name))
    remedy = f'"longvita[{holders[0]}]"' if holders else wanted
    return f"this command needs the Python package {wanted!r}, which is not installed. Install it with: pip install {remedy}"


def describe(error: BaseException) -> tuple[str, int]:
    """(message, exit code) for an exception that ended a command."""
    if isinstance(error, ModuleNotFoundError) and error.name and not str(error).count("pip install"):
        return missing_module(error.name), FAILED
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return (f"{error.strerror}: {error.filename}" if error.filename else str(error)), WRONG_INPUT
    if isinstance(error, ValueError):
        return str(error), WRONG_INPUT
    if isinstance(error, MemoryError):
        return "out of memory: use a shorter context, a smaller model or a machine with more memory", FAILED
    if isinstance(error, OSError | RuntimeError | ImportError | ArithmeticError):
        return str(error) or type(error).__name__, FAILED
    return f"internal error, please report it: {type(error).__name__}: {error}{_where(error.__traceback__)}", FAILED


def _where(trace: TracebackType | None) -> str:
    frames = traceback.extract_tb(trace)
    return f" (at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}; --debug shows the traceback)" if frames else ""


class Boundary:
    """The edge of the process: every exception inside becomes one message on stderr and `code`; with debug=True it passes through."""

    def __init__(self, command: str, debug: bool = False) -> None:
        self.command, self.debug, self.code = command, debug, OK

    def __enter__(self):
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if error is None or isinstance(error, SystemExit):
            return False
        if isinstance(error, KeyboardInterrupt):
            message, self.code = f"interrupted: {str(error) or INTERRUPTED_HINT}", INTERRUPTED
        elif isinstance(error, BrokenPipeError):
            # The reader of our output has gone (`longvita … | head`): nobody is left to tell, and the flush at exit must not fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.code = FAILED
            return True
        else:
            message, self.code = describe(error)
            if self.debug:
                traceback.print_exception(error)
        print(f"longvita {self.command}: {message}".rstrip(), file=sys.stderr, flush=True)
        return True
