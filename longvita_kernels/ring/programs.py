"""What one rank does in each step: which messages it sends and receives, and which kernel calls it makes.

All positions here are local: in the rank's own tokens, which lie in the order of their packed positions, or in the buffer of a step, where
what arrives lies ordered by sender. A call of the kernel takes several stretches of queries and of keys at once, as packed documents of its
own; what a stretch of queries sees of a stretch of keys is put in terms of the kernel's mask, which is aligned at their ends:

    queries [a, b), keys [c, d) of one document, limits (left, right):    left' = left + d − b        right' = right + b − d

Both are cut back first to what is seen at all, so neither falls below 0, and a limit that cuts nothing becomes −1. So without a window
there are two kinds only: the rank's own documents, causal, and keys that lie wholly before the queries that see them.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass(frozen=True)
class Message:
    """`pieces`: (start, stop, buffer), in this order; buffer 0 is the rank's own tokens, s > 0 what arrived in step s."""

    peer: int
    step: int
    pieces: list

    @property
    def tokens(self):
        return sum(stop - start for start, stop, _ in self.pieces)

    @property
    def own(self):
        return all(buffer == 0 for _, _, buffer in self.pieces)

    def takes_from(self, step):
        return any(buffer == step for _, _, buffer in self.pieces)


@dataclass(frozen=True, eq=False)
class Call:
    """One kernel call: its stretches of queries and of keys, end to end, and the documents they make. area: visible pairs of a head."""

    queries: list
    keys: list
    cu_queries: np.ndarray
    cu_keys: np.ndarray
    left: int
    right: int
    area: int
    _offsets: dict = field(default_factory=dict)

    def offsets(self, device):
        """(cu_seqlens_q, cu_seqlens_k) there, made once, and the longest documents."""
        if device not in self._offsets:
            both = self.cu_queries, self.cu_keys
            longest = [int(np.diff(cu).max(initial=0)) for cu in both]
            self._offsets[device] = *(torch.from_numpy(cu).to(device) for cu in both), *longest
        return self._offsets[device]


@dataclass
class Step:
    """sources: (peer, start, stop) in the step's buffer, whose length is `tokens`."""

    tokens: int = 0
    sources: list = field(default_factory=list)
    calls: list = field(default_factory=list)


@dataclass
class Program:
    """steps[0] is the rank's own; sends[s]: the messages that belong to step s; after tick last_use[s] nobody needs the keys of step s."""

    tokens: int
    steps: list
    sends: list
    last_use: dict


def write_program(documents, slices, routes, rank):
    """The program of one rank. slices: its own ranges; routes: those of all."""
    own = _Own(documents, slices)
    steps = [Step(own.tokens, [], own.calls())] + [Step() for _ in range(routes.steps)]
    sends = [[] for _ in range(routes.steps + 1)]
    arrived = {}  # packed start of a row that arrived → (step, its place in the buffer)
    rows = np.flatnonzero((routes.target == rank) | (routes.source == rank))
    table = [x[rows].tolist() for x in (routes.step, routes.source, routes.target, routes.origin, routes.start, routes.stop)]
    stretches = defaultdict(list)
    for step, source, target, origin, start, stop in zip(*table, strict=True):
        if target == rank:
            into, size = steps[step], stop - start
            arrived[start] = step, into.tokens
            _extend(stretches[step], start, stop, start - into.tokens)
            if into.sources and into.sources[-1][0] == source:
                into.sources[-1] = (source, into.sources[-1][1], into.tokens + size)
            else:
                into.sources.append((source, into.tokens, into.tokens + size))
            into.tokens += size
        else:
            if not sends[step] or sends[step][-1].peer != target:
                sends[step].append(Message(target, step, []))
            buffer, at = (0, own.place(start)) if origin == rank else arrived[start]
            _extend(sends[step][-1].pieces, at, at + stop - start, buffer)
    for step, found in stretches.items():
        steps[step].calls = own.calls(found)
    last_use = {step: step for step in range(1, len(steps))}
    for step, messages in enumerate(sends):
        for buffer in {buffer for message in messages for _, _, buffer in message.pieces if buffer}:
            last_use[buffer] = max(last_use[buffer], routes.sent_at[step])
    return Program(own.tokens, steps, sends, last_use)


def _extend(ranges, start, stop, *tag):
    """Append (start, stop, *tag), or lengthen the last range if the new one follows it under the same tag."""
    if ranges and ranges[-1][1:] == (start, *tag):
        start = ranges.pop()[0]
    ranges.append((start, stop, *tag))


class _Own:
    """A rank's own tokens as pieces of documents: (document, start and stop in the document, local start)."""

    def __init__(self, documents, slices):
        self.documents, self.slices = documents, slices
        sizes = slices[:, 1] - slices[:, 0]
        self.locals, self.tokens = np.cumsum(sizes) - sizes, int(sizes.sum())
        self.pieces = self._split([(a, b, a - c) for (a, b), c in zip(slices.tolist(), self.locals.tolist(), strict=True)])
        self.by_document = defaultdict(list)
        for piece in self.pieces:
            self.by_document[piece[0]].append(piece)
        # Without a window the pieces of one document, end to end, are a document of their own: earlier ones are seen whole.
        self.joins = documents.left < 0 and documents.right <= 0

    def place(self, start):
        i = int(np.searchsorted(self.slices[:, 0], start, side="right")) - 1
        return int(self.locals[i] + start - self.slices[i, 0])

    def _split(self, stretches):
        """Packed (start, stop, shift) cut at document boundaries → (document, start and stop inside it, place = packed start − shift)."""
        offsets, out = self.documents.offsets, []
        for start, stop, shift in stretches:
            document, last = int(self.documents.at(start)), int(self.documents.at(stop - 1))
            ends = np.clip(offsets[document + 1 : last + 2], start, stop).tolist()
            for n, end in enumerate(ends, document):
                if end > start:
                    base = int(offsets[n])
                    out.append((n, start - base, end - base, start - shift))
                    start = end
        return out

    def calls(self, stretches=None):
        """Kernel calls of the own queries with the keys of a step; without argument, with the own keys."""
        if stretches is None:
            found = [] if self.joins else [pair for pieces in self.by_document.values() for pair in self._among(pieces)]
            return ([self._own_call()] if self.tokens else []) + _calls(found)
        keys = self._split(stretches)
        return _calls([pair for key in keys for piece in self.by_document[key[0]] if (pair := self._pair(piece, key))])

    def _own_call(self):
        documents, starts, stops, places = (np.array(x) for x in zip(*self.pieces, strict=True))
        new = np.append(True, documents[1:] != documents[:-1]) if self.joins else np.ones(len(places), dtype=bool)
        cu = np.append(places[new], self.tokens).astype(np.int32)
        lengths = np.diff(cu).astype(np.int64)
        area = sum(_area(n, n, self.documents.left, self.documents.right) for n in lengths.tolist())
        return Call([(0, self.tokens)], [(0, self.tokens)], cu, cu, self.documents.left, self.documents.right, area)

    def _among(self, pieces):
        pairs = (self._pair(piece, key) for piece in pieces for key in pieces if piece is not key)
        return [pair for pair in pairs if pair]

    def _pair(self, piece, key):
        """What of a piece of queries sees what of a piece of keys: (document, queries, keys, left, right), or None."""
        (document, a, b, q_place), (_, c, d, k_place) = piece, key
        left, right = self.documents.left, self.documents.right
        first = a if right < 0 else max(a, c - right)
        last = b if left < 0 else min(b, d + left)
        if first >= last:
            return None
        low = c if left < 0 else max(c, first - left)
        high = d if right < 0 else min(d, last + right)
        if low >= high:
            return None
        binds_left, binds_right = left >= 0 and last - 1 - left > low, right >= 0 and first + right < high - 1
        queries, keys = (q_place + first - a, q_place + last - a), (k_place + low - c, k_place + high - c)
        return document, queries, keys, left + high - last if binds_left else -1, right + last - high if binds_right else -1


def _calls(pairs):
    """As few calls as possible: one for each kind of mask, unless stretches of queries meet twice."""
    kinds = defaultdict(list)
    for document, queries, keys, left, right in pairs:
        kinds[left, right].append((document, queries, keys))
    calls = []
    for (left, right), found in kinds.items():
        entries = _joined(found) if (left, right) == (-1, -1) else [([queries], [keys]) for _, queries, keys in found]
        entries.sort(key=lambda entry: entry[0][0])
        groups = []
        for entry in entries:
            group = next((g for g in groups if g[-1][0][-1][1] <= entry[0][0][0]), None)
            if group is None:
                groups.append([entry])
            else:
                group.append(entry)
        calls += [_call(group, left, right) for group in groups]
    return calls


def _joined(pairs):
    """Keys that the same queries of a document see whole become one stretch of keys, and those queries one of queries."""
    seen_by = defaultdict(list)
    for document, queries, keys in pairs:
        seen_by[document, keys].append(queries)
    entries = defaultdict(list)
    for (document, keys), queries in seen_by.items():
        entries[document, tuple(sorted(queries))].append(keys)
    return [(list(queries), keys) for (_, queries), keys in entries.items()]


def _call(entries, left, right):
    queries, keys, sizes = [], [], []
    for entry in entries:
        for range_ in entry[0]:
            _extend(queries, *range_)
        for range_ in entry[1]:
            _extend(keys, *range_)
        sizes.append([sum(b - a for a, b in part) for part in entry])
    cu = np.concatenate((np.zeros((1, 2), dtype=np.int64), np.cumsum(sizes, axis=0))).astype(np.int32)
    return Call(queries, keys, cu[:, 0].copy(), cu[:, 1].copy(), left, right, sum(_area(q, k, left, right) for q, k in sizes))


def _area(queries, keys, left, right):
    """Visible pairs of one document of a call."""
    if left < 0 and right < 0:
        return queries * keys
    position = np.arange(queries) + keys - queries
    low = np.maximum(position - left, 0) if left >= 0 else 0
    high = np.minimum(position + right + 1, keys) if right >= 0 else keys
    return int(np.maximum(high - low, 0).sum())
