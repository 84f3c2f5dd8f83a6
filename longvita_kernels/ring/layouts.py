"""Who owns which tokens: the packed row of documents cut into one part a rank. numpy only, no loop over documents or blocks.

A *part* is a few contiguous ranges of the packed row. `balanced` rests on this: bend what is left of the row into a circle. The arcs of c
tokens have, over all their starting points, the mean area, and area changes continuously with the starting point; so some arc has exactly
the mean area, whatever the documents are. Take the cheapest such arc, close the circle, go on: every rank gets equal tokens and equal area,
and W ranks make at most 2W cuts. For one long causal document that gives the familiar zigzag (from the middle outwards); for short
documents it gives runs of whole ones; for a mixture, short documents together with the end of a long one.

T: packed tokens. W: ranks. Positions are packed (0 to T) where nothing else is said.
"""

import numpy as np

BLOCK = 128  # starting points that are tried lie so far apart (closer in small rows), at document boundaries where there are any
# … further apart where there would be more of them than so many and, a rank, so many: planning takes milliseconds at any length
BLOCKS, BLOCKS_A_RANK = 2048, 8
EXACT, LOOSE = 0.002, 0.02  # an arc may miss the mean area by so much; by the second figure only where that halves what it must receive
FINE = 32  # starting points tried between two of those
CUT = 64  # what a further slice costs, in tokens to receive


class Documents:
    """Packed documents and what a query sees: `left` keys before itself and `right` after, −1: all."""

    def __init__(self, offsets, left, right):
        # a larger window shows no more, and sums with it could overflow
        self.offsets, self.left, self.right = offsets, *(min(limit, int(offsets[-1])) for limit in (left, right))
        self.lengths = np.diff(offsets)
        self._areas_before = np.concatenate(([0], np.cumsum(self.area_of_head(self.lengths, self.lengths))))

    @property
    def tokens(self):
        return int(self.offsets[-1])

    def at(self, x):
        """Document of each packed position (of T: the last)."""
        return np.clip(np.searchsorted(self.offsets, x, side="right") - 1, 0, max(len(self.lengths) - 1, 0))

    def area_before(self, x):
        """Visible (query, key) pairs of all queries before packed position x."""
        if not len(self.lengths):
            return np.zeros_like(x)
        document = self.at(x)
        return self._areas_before[document] + self.area_of_head(x - self.offsets[document], self.lengths[document])

    def area_of_head(self, queries, length):
        """Visible pairs of the first `queries` queries of a document of `length` tokens."""

        def clipped_sum(count, limit):  # Σ min(i, limit) over i < count
            short = np.minimum(count, limit)
            return short * (short - 1) // 2 + (count - short) * limit

        left = length if self.left < 0 else np.minimum(self.left, length)
        right = length if self.right < 0 else np.minimum(self.right, length)
        return queries + clipped_sum(queries, left) + clipped_sum(length, right) - clipped_sum(length - queries, right)

    def keys_to_enter(self, x):
        """About how many keys a rank must receive whose tokens begin at packed position x, the ones before being elsewhere."""
        document = self.at(x)
        before = x - self.offsets[document]
        if self.right < 0:  # everything is looked at, however little of the document one owns
            return self.lengths[document]
        return before if self.left < 0 else np.minimum(before, self.left)


def contiguous(documents, world_size):
    """Rank r owns the r-th of W equal pieces of the row."""
    cuts = documents.tokens * np.arange(world_size + 1) // world_size
    return [joined(np.array([[a, b]])) for a, b in zip(cuts, cuts[1:], strict=False)]


def zigzag(documents, world_size):
    """Every document in 2W pieces, of which rank r owns the r-th and the r-th from the end.

    Lengths need not divide: the tokens left over go round from rank to rank, on from document to document, first to a rank's early piece.
    """
    base, rest = documents.lengths // (2 * world_size), documents.lengths % (2 * world_size)
    turn = np.concatenate(([0], np.cumsum(rest)[:-1])) if len(rest) else rest
    start, parts = documents.offsets[:-1].copy(), [[] for _ in range(world_size)]
    for piece in range(2 * world_size):
        late = piece >= world_size
        rank = 2 * world_size - 1 - piece if late else piece
        extra = (rank - turn) % world_size + (world_size if late else 0) < rest
        stop = start + base + extra
        parts[rank].append(np.stack((start, stop), axis=1))
        start = stop
    return [joined(np.concatenate(part)) for part in parts]


def balanced(documents, world_size, ranks_per_node):
    """Equal tokens and (nearly) equal area. First the nodes share the row, then the ranks of each node share its part."""
    starts = _block_starts(documents, world_size)
    row = _row(documents, np.stack((starts, np.append(starts[1:], documents.tokens)[: len(starts)])))
    nodes = _arcs(documents, row, world_size // ranks_per_node)
    return [joined(part[:2].T) for node in nodes for part in _arcs(documents, node, ranks_per_node)]


def joined(ranges):
    """Disjoint ranges in order, those that adjoin made one, empty ones left out."""
    ranges = ranges[ranges[:, 1] > ranges[:, 0]]
    ranges = ranges[np.argsort(ranges[:, 0])]
    new = np.append(True, ranges[1:, 0] != ranges[:-1, 1])[: len(ranges)]
    return np.stack((ranges[new, 0], ranges[np.append(new[1:], True)[: len(ranges)], 1]), axis=1)


def _block_starts(documents, world_size):
    """One starting point in each block of the packed row: the first document boundary in it, else its beginning."""
    tokens = documents.tokens
    most = max(BLOCKS, BLOCKS_A_RANK * world_size)
    block = max(1, min(BLOCK, tokens // (16 * world_size)), -(-tokens // most))
    starts = np.arange(0, tokens, block)
    boundaries = documents.offsets[(documents.offsets > 0) & (documents.offsets < tokens)]
    blocks, first = np.unique(boundaries // block, return_index=True)
    starts[blocks[blocks > 0]] = boundaries[first][blocks > 0]
    return starts


# A row under work is an int64 array of ranges with what is asked of them again and again, one column each:
# packed start, stop, area, tokens to receive on entering there, document of the first and of the last token.


def _row(documents, ranges):
    area = documents.area_before(ranges[1]) - documents.area_before(ranges[0])
    return np.stack((*ranges, area, documents.keys_to_enter(ranges[0]), documents.at(ranges[0]), documents.at(ranges[1] - 1)))


def _arcs(documents, row, count):
    """The row as `count` parts, equal within one token, cut from the circle one after the other; in order of their first token."""
    if row.shape[1] == 0:
        return [row] * count
    tokens = int((row[1] - row[0]).sum())
    sizes = np.diff(tokens * np.arange(count + 1) // count)
    mean = row[2].sum() / tokens
    parts, most = [], sizes.max()
    for size in sizes[:-1]:
        start = _best_start(documents, row, int(size), mean, most) if size else 0
        arc, row = _take(documents, row, start, int(size))
        parts.append(arc)
    parts.append(row)
    order = sorted(range(len(parts)), key=lambda i: (parts[i][0].min() if parts[i].shape[1] else documents.tokens, i))
    return [parts[i] for i in order]


def _best_start(documents, row, size, mean, most):
    """Where in the row the arc begins that is cheapest among those of the right area. mean: area of a token; most: tokens of a part."""
    starts, stops, areas, entering, document, last_document = row
    lengths, ends, area_ends = stops - starts, np.cumsum(stops - starts), np.cumsum(areas)
    tokens, area, begins = ends[-1], area_ends[-1], ends - lengths
    # tokens to receive on stepping from a range to the next: nothing where they adjoin, the gap inside a document, else what entering costs
    gap = starts - np.roll(stops, 1)
    inside = (document == np.roll(last_document, 1)) & (gap >= 0)
    steps = np.cumsum(np.where(inside, 0 if documents.right < 0 else np.minimum(entering, gap), entering) + CUT * (gap != 0))

    def area_to(x):
        i = np.searchsorted(ends, x, side="right")
        return area_ends[i] - areas[i] + documents.area_before(starts[i] + x - begins[i]) - documents.area_before(starts[i])

    def excess(begin, area_before):
        """Of the area of the arc that begins there, over a fair share of what is left; and where it stops, perhaps after going round."""
        stop = begin + size
        laps = stop >= tokens
        stop = stop - laps * tokens
        return area_to(stop) + laps * area - area_before - area * (size / tokens), stop, laps

    over, stop, laps = excess(begins, area_ends - areas)
    last = np.searchsorted(ends, stop, side="right")
    last -= stop == begins[last]  # a range that is not reached costs nothing; −1: the last one, before going round
    received = entering + steps[last] + (laps & (last >= 0)) * steps[-1] - steps
    unit, rest = mean * most, mean * (tokens - size)
    surplus = (area - mean * tokens) * (1 - size / tokens) - over  # what is then left has that much area over its fair share

    def within(bound):
        return (np.abs(over) <= bound * unit) & (np.abs(surplus) <= bound / 2 * max(rest, unit))

    exact, crossing = within(EXACT), (over < 0) != (np.roll(over, -1) < 0)  # crossing: between it and the next there is one that fits
    candidates = np.flatnonzero(exact | crossing)
    best = candidates[np.argmin(received[candidates])] if len(candidates) else np.argmin(np.abs(over))
    loose = np.flatnonzero(within(LOOSE))
    if len(loose) and 2 * received[loose].min() < received[best]:
        return int(begins[loose[np.argmin(received[loose])]])
    if not crossing[best] or exact[best]:
        return int(begins[best])
    fine = begins[best] + np.arange(FINE) * lengths[best] // FINE
    return int(fine[np.argmin(np.abs(excess(fine, area_to(fine))[0]))])


def _take(documents, row, start, size):
    """(the arc of `size` tokens that begins `start` tokens into the row and may go round, what is left), both in the row's order."""
    tokens = int((row[1] - row[0]).sum())
    start %= tokens
    before, after = _cut(documents, row, start)
    if start + size <= tokens:
        arc, after = _cut(documents, after, size)
        return arc, np.concatenate((before, after), axis=1)
    wrapped, rest = _cut(documents, before, start + size - tokens)
    return np.concatenate((wrapped, after), axis=1), rest


def _cut(documents, row, at):
    """(the first `at` tokens of the row, the rest)."""
    ends = np.cumsum(row[1] - row[0])
    i = int(np.searchsorted(ends, at, side="right"))
    offset = at - (int(ends[i - 1]) if i else 0)
    if offset == 0:
        return row[:, :i], row[:, i:]
    start, stop = row[:2, i]
    halves = _row(documents, np.array([[start, start + offset], [start + offset, stop]]))
    return np.concatenate((row[:, :i], halves[:, :1]), axis=1), np.concatenate((halves[:, 1:], row[:, i + 1 :]), axis=1)
