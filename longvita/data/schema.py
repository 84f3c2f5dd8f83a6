"""What a training row is, and a strict reader for JSONL files of them.

    {"messages": [{"role": "user", "content": "<image>\\nWhat is it?"}, {"role": "assistant", "content": "A seven."}], "images": ["7.jpg"]}
    {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello!"}]}

Content is a string, in which `<image>` and `<video>` of a user's turn stand for the next of `images` and `videos`, or a list of parts
({"type": "text", "text": …}, {"type": "image", "image": …}, {"type": "video", "video": …}), in which text is always literal. A media part
without a source takes the next of the row's list. Anything else is a DataError that names file and line.
"""

import difflib
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

ROW_KEYS = ("messages", "conversations", "images", "videos", "id", "metadata")
ROLES = ("system", "user", "assistant")
_FROM = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
_PLACEHOLDER = re.compile("(<image>|<video>)")
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+:")  # "http://…", "file:…", "concat:…"
MAX_LINE_BYTES = 2**26  # a million tokens of text are about 5 MB


class DataError(ValueError):
    """Something is wrong with the data, not with the program. `reason` is a short code that drop counters use as their key."""

    def __init__(self, reason: str, message: str, where: str | None = None):
        super().__init__(f"{where}: {message}" if where else message)
        self.reason, self.message, self.where = reason, message, where

    def at(self, where: str) -> "DataError":
        """The same error with its place in front, unless it already names one."""
        return self if self.where else type(self)(self.reason, self.message, where)


@dataclass(frozen=True)
class Part:
    """A piece of a turn: kind "text" with a string, or "image" or "video" with anything `media` can open."""

    kind: str
    value: Any


@dataclass(frozen=True)
class Turn:
    role: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, eq=False)
class Sample:
    """One conversation and its media, as a row of a JSONL file has them or as a program builds them.

    messages  [{"role": …, "content": string or list of parts}, …]
    images    what the `<image>` placeholders of string contents stand for, in order
    videos    the same for `<video>`
    source, line   where it comes from, for error messages; no source: a conversation that its caller has at hand
    """

    messages: Sequence[Mapping]
    images: Sequence = ()
    videos: Sequence = ()
    source: str = ""
    line: int = 0
    placeholders: bool = field(default=True)  # False: `<image>` in a string is just text

    @property
    def where(self) -> str:
        return _place(self.source, self.line)

    def turns(self, *, training: bool = True) -> tuple[Turn, ...]:
        """The checked turns, every medium in its place. DataError for whatever does not fit the schema.

        `training`: the last turn must be the assistant's, with an answer to learn; otherwise it must be the user's, to be answered.
        """
        try:
            return _Reader(self).turns(training)
        except DataError as error:
            raise error.at(self.where) from None


def _place(source: str, line: int) -> str:
    return f"{source}:{line}" if source else ""


def as_sample(item, source: str = "", line: int = 0) -> Sample:
    """A Sample from a Sample, a row (dict with "messages" or "conversations") or a list of messages (whose strings are literal text)."""
    if isinstance(item, Sample):
        return item
    if isinstance(item, Mapping):
        return _sample_from_row(item, source, line)
    if isinstance(item, Sequence) and not isinstance(item, str | bytes):
        return Sample(item, source=source, line=line, placeholders=False)
    raise DataError(
        "schema",
        f"expected a Sample, a row with 'messages' or a list of messages, got {_describe(item)}; see longvita.data.schema",
        _place(source, line),
    )


# ---- rows ----


def _describe(value) -> str:
    text = repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "…"


def _check_keys(mapping: Mapping, known: Sequence[str], what: str) -> None:
    for key in mapping:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise DataError(
                "unknown_key",
                f"expected only the keys {', '.join(known)} in {what}, got {key!r}; did you mean {near!r}? Rename or remove it",
            )


def _media_list(row: Mapping, key: str) -> tuple:
    value = row.get(key)
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise DataError("schema", f'expected a list of paths under {key!r}, got {_describe(value)}; write {key!r}: ["…"] even for one')
    return tuple(value)


def _sample_from_row(row: Mapping, source: str, line: int) -> Sample:
    try:
        _check_keys(row, ROW_KEYS, "a row")
        if ("messages" in row) == ("conversations" in row):
            got = "both" if "messages" in row else f"only {', '.join(map(repr, row)) or 'an empty object'}"
            raise DataError("schema", f"expected exactly one of 'messages' and 'conversations', got {got}; keep one list of turns")
        messages = row["messages"] if "messages" in row else _from_conversations(row["conversations"])
        return Sample(messages, _media_list(row, "images"), _media_list(row, "videos"), source, line)
    except DataError as error:
        raise error.at(f"{source}:{line}") from None


def _from_conversations(turns) -> list[dict]:
    if not isinstance(turns, list | tuple):
        raise DataError(
            "schema", f'expected a list of turns under \'conversations\', got {_describe(turns)}; write [{{"from", "value"}}, …]'
        )
    messages = []
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise DataError("schema", f"expected every turn to be an object with 'from' and 'value', got {_describe(turn)}; wrap it")
        _check_keys(turn, ("from", "value"), "a turn of 'conversations'")
        if turn.get("from") not in _FROM:
            raise DataError(
                "role", f"expected 'from' to be one of {', '.join(_FROM)}, got {_describe(turn.get('from'))}; rename the speaker"
            )
        if "value" not in turn:
            raise DataError("schema", "expected a 'value' in every turn, got none; add the text")
        messages.append({"role": _FROM[turn["from"]], "content": turn["value"]})
    return messages


class _Reader:
    """Walks the messages of one sample once, handing out the media in order."""

    def __init__(self, sample: Sample):
        self.sample = sample
        self.given = {"image": list(sample.images), "video": list(sample.videos)}
        self.used = {"image": 0, "video": 0}

    def turns(self, training: bool) -> tuple[Turn, ...]:
        messages = self.sample.messages
        if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
            raise DataError(
                "schema", f"expected a list with at least one message, got {_describe(messages)}; a conversation starts with a user's turn"
            )
        turns = tuple(self._turn(message, number) for number, message in enumerate(messages, 1))
        _check_order(turns, training)
        for kind, used in self.used.items():
            if used != len(self.given[kind]):
                raise DataError(
                    "placeholder",
                    f"expected as many <{kind}> placeholders as {kind}s, got {used} and {len(self.given[kind])}; give every placeholder in "
                    f'a user\'s string one entry of {kind}s (a literal <{kind}> belongs in a part list: {{"type": "text", …}})',
                )
        return turns

    def _turn(self, message, number: int) -> Turn:
        if not isinstance(message, Mapping):
            raise DataError(
                "schema", f"expected message {number} to be an object with 'role' and 'content', got {_describe(message)}; wrap it"
            )
        _check_keys(message, ("role", "content"), f"message {number}")
        role = message.get("role")
        if role not in ROLES:
            raise DataError(
                "role",
                f"expected role to be one of {', '.join(ROLES)}, got {_describe(role)} in message {number}; rename or remove the turn",
            )
        content = message.get("content")
        if isinstance(content, str):
            parts = self._split(content) if role == "user" and self.sample.placeholders else [Part("text", content)]
        elif isinstance(content, list | tuple):
            parts = [self._part(part, number) for part in content]
        else:
            raise DataError(
                "schema", f"expected content to be a string or a list of parts, got {_describe(content)} in message {number}; add the text"
            )
        for part in parts:
            _check_part(part, role, number)
        parts = tuple(part for part in parts if part.kind != "text" or part.value)
        if not any(part.kind != "text" or part.value.strip() for part in parts):
            reason = "empty_answer" if role == "assistant" else "empty_turn"
            raise DataError(reason, f"expected text in the {role}'s message {number}, got nothing but blanks; fill it in or remove the row")
        return Turn(role, parts)

    def _split(self, text: str) -> list[Part]:
        """A user's string content, cut at its placeholders."""
        pieces = _PLACEHOLDER.split(text)
        return [Part("text", piece) if i % 2 == 0 else self._next(piece[1:-1]) for i, piece in enumerate(pieces)]

    def _part(self, part, number: int) -> Part:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "image", "video"):
            got = _describe(kind if isinstance(part, Mapping) else part)
            raise DataError(
                "schema", f"expected parts of type text, image or video, got {got} in message {number}; give every part one of these types"
            )
        _check_keys(part, ("type", kind), f"a part of message {number}")
        if part.get(kind) is None and kind != "text":
            return self._next(kind)
        if kind == "text" and not isinstance(part.get("text"), str):
            raise DataError(
                "schema", f"expected a string under 'text', got {_describe(part.get('text'))} in message {number}; add the text"
            )
        return Part(kind, part[kind])

    def _next(self, kind: str) -> Part:
        number, self.used[kind] = self.used[kind], self.used[kind] + 1
        return Part(kind, self.given[kind][number] if number < len(self.given[kind]) else None)


def _check_part(part: Part, role: str, number: int) -> None:
    if part.kind != "text" and role != "user":
        raise DataError(
            "role", f"expected {part.kind}s in the user's turns only, got one in the {role}'s message {number}; move it to the question"
        )
    if part.kind == "text":
        try:
            part.value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                "utf8",
                f"expected text, got half of a surrogate pair at character {error.start} of message {number}; replace the \\ud… escape",
            ) from None


def _check_order(turns: tuple[Turn, ...], training: bool) -> None:
    roles = [turn.role for turn in turns]
    spoken = roles[1:] if roles[0] == "system" else roles
    expected = [("user", "assistant")[i % 2] for i in range(len(spoken))]
    if spoken != expected:
        raise DataError(
            "role", f"expected user and assistant in turns after at most one system message, got {', '.join(roles)}; reorder or join them"
        )
    last = "assistant" if training else "user"
    if roles[-1] != last:
        why = "there is no answer to learn from" if training else "there is no question to answer"
        raise DataError("role", f"expected the last message to be the {last}'s, got the {roles[-1]}'s; {why}: add or remove a message")


# ---- files ----


class JsonlSource:
    """Rows of a JSONL file, read by number without holding the file: `len(source)`, `source[i]` → Sample.

    Relative media paths are taken from `media_dir`, by default the file's own directory. Blank lines are not rows.
    """

    def __init__(self, path: str | os.PathLike, *, media_dir: str | os.PathLike | None = None, max_line_bytes: int = MAX_LINE_BYTES):
        self.path = os.fspath(path)
        self.media_dir = os.fspath(media_dir) if media_dir is not None else os.path.dirname(os.path.abspath(self.path))
        self.max_line_bytes = max_line_bytes
        self._starts, self._lines = _index_lines(self.path)
        self.checksum = zlib.crc32(self._starts.tobytes())  # of the rows' places: changes when rows come, go or grow

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        line = int(self._lines[index])
        start, end = self._starts[index : index + 2].tolist()
        where = f"{self.path}:{line}"
        if end - start > self.max_line_bytes:
            raise DataError(
                "line_too_long", f"expected at most {self.max_line_bytes} bytes in a line, got {end - start}; one row per line", where
            )
        with open(self.path, "rb") as file:
            file.seek(start)
            raw = file.read(end - start)
        sample = _sample_from_row(_parse(raw, where), self.path, line)
        return _with_media_dir(sample, self.media_dir)


def _index_lines(path: str) -> tuple[np.ndarray, np.ndarray]:
    """(rows + 1,) byte offsets where rows start, with the file's size last; (rows,) line numbers from 1."""
    starts, lines, offset, number, blank, at_start = [], [], 0, 1, True, 0
    try:
        with open(path, "rb") as file:
            while chunk := file.readline(2**20):
                blank = blank and not chunk.strip()
                offset += len(chunk)
                if chunk.endswith(b"\n"):
                    if not blank:
                        starts.append(at_start)
                        lines.append(number)
                    number, blank, at_start = number + 1, True, offset
    except OSError as error:
        raise DataError("missing", f"expected a readable JSONL file, got {error.strerror or error}; check the path", path) from None
    if not blank:
        starts.append(at_start)
        lines.append(number)
    return np.array([*starts, offset], dtype=np.int64), np.array(lines, dtype=np.int64)


def _parse(raw: bytes, where: str) -> Mapping:
    """One line of JSON. Repeated keys, NaN, a byte order mark and bytes that are no UTF-8 are errors."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            "utf8", f"expected UTF-8, got byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line; convert the file", where
        ) from None
    if text.startswith("\ufeff"):
        raise DataError("utf8", "expected JSON, got a byte order mark; save the file as UTF-8 without one", where)

    def unique(pairs):
        keys = Counter(key for key, _ in pairs)
        repeated = [key for key, count in keys.items() if count > 1]
        if repeated:
            raise DataError("json", f"expected every key once in an object, got {repeated[0]!r} twice; remove one", where)
        return dict(pairs)

    def constant(name):
        raise DataError("json", f"expected JSON, got {name}, which is none; remove it", where)

    try:
        row = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except json.JSONDecodeError as error:
        column = error.colno if error.lineno == 1 else error.pos + 1
        raise DataError(
            "json", f"expected one JSON object per line, got broken JSON at column {column} ({error.msg}); fix or remove the line", where
        ) from None
    except RecursionError:
        raise DataError("json", "expected a flat row, got JSON nested a thousand levels deep; remove the line", where) from None
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError("json", f"expected a row, got a number Python does not read ({error}); remove the line", where) from None
    if not isinstance(row, dict):
        raise DataError("json", f'expected one JSON object per line, got {_describe(row)}; write {{"messages": …}}', where)
    return row


def _with_media_dir(sample: Sample, media_dir: str) -> Sample:
    def place(source):
        if not isinstance(source, str) or not source:
            raise DataError("schema", f"expected a path as text, got {_describe(source)}; name a file", sample.where)
        return source if SCHEME.match(source) else os.path.join(media_dir, source)

    def place_all(message):
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, list):
            return message
        return {**message, "content": [_place_part(part, place) for part in content]}

    messages = sample.messages
    if isinstance(messages, list):
        messages = [place_all(message) for message in messages]
    images, videos = [place(x) for x in sample.images], [place(x) for x in sample.videos]
    return Sample(messages, images, videos, sample.source, sample.line)


def _place_part(part, place):
    kind = part.get("type") if isinstance(part, Mapping) else None
    return {**part, kind: place(part[kind])} if kind in ("image", "video") and part.get(kind) is not None else part


def read_jsonl(
    path: str | os.PathLike, *, on_error: str = "strict", dropped: Counter | None = None, training: bool = True
) -> Iterator[Sample]:
    """The checked samples of a file. on_error="strict" raises the first DataError; "skip" goes on and counts it in `dropped` by reason."""
    check_policy(on_error)
    source = JsonlSource(path)
    for index in range(len(source)):
        try:
            sample = source[index]
            sample.turns(training=training)
        except DataError as error:
            if on_error == "strict":
                raise
            if dropped is not None:
                dropped[error.reason] += 1
            continue
        yield sample


def check_policy(on_error: str) -> None:
    if on_error not in ("strict", "skip"):
        raise ValueError(f"on_error must be 'strict' (raise at the first bad row) or 'skip' (count it and go on), got {on_error!r}")
