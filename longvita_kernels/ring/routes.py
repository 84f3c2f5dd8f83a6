"""Who needs which keys and values, and over which way and in which step they come. numpy only, all ranks at once.

A *row* is one packed range of keys that one rank sends to another. Every rank gets the ranges that its queries see and that it does not
own, each once. From another node a range comes to one of the ranks that need it, which passes it on to the others there: it crosses
between the nodes once, and nobody receives what it does not use.

A *step* is what arrives together and is computed on together; step 0 is what a rank owns. Steps are the same for all ranks: first from
neighbour to neighbour inside a node, then node by node. Neighbouring steps are joined while what arrives is no more than a rank owns, so
short documents and windows take one or two.

*Ticks* are the moments of a call: at tick t the keys of step t are computed on. In the backward the gradients of a step's keys go back the
way the keys came, and whoever passed keys on adds up what comes back before it sends its own.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Routes:
    """Rows, ordered by (step, source, target, start), and the times of the steps.

    source, target, start, stop, step   one entry a row; step ≥ 1
    origin       the owner, who is the source itself or, for what is passed on, somebody before it
    sent_at      tick at which the keys of each step (entry 0 unused) leave; they are needed at tick `step`
    returned_at  tick at which the gradients of each step leave; they are added at the next
    """

    source: np.ndarray
    target: np.ndarray
    origin: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    step: np.ndarray
    sent_at: list
    returned_at: list

    @property
    def steps(self):
        return len(self.sent_at) - 1


def find_routes(documents, slices, ranks_per_node):
    """slices: one (n, 2) array of packed ranges a rank."""
    target, origin, start, stop = _needed(documents, slices)
    per_node, nodes = ranks_per_node, len(slices) // ranks_per_node
    source, target, origin, start, stop = _passed_on(target, origin, start, stop, per_node)
    phase = (target // per_node - origin // per_node) % nodes
    # within a phase: 0 is the crossing between nodes, then the neighbours inside the node in turn
    turn = np.where(target // per_node == source // per_node, (target - source) % per_node, 0)
    step, sent_at, returned_at = _steps(phase, turn, target, stop - start, slices, per_node)
    order = np.lexsort((start, target, source, step))
    return Routes(*(x[order] for x in (source, target, origin, start, stop, step)), sent_at, returned_at)


def _needed(documents, slices):
    """(rank, owner, start, stop) of all keys that a rank's queries see and it does not own; ranges cut where owners change."""
    ranks = np.repeat(np.arange(len(slices)), [len(part) for part in slices])
    own = np.concatenate(slices) if len(ranks) else np.zeros((0, 2), dtype=np.int64)
    if not len(ranks):
        return (np.zeros(0, dtype=np.int64),) * 4
    # only the first and the last document of a slice can be cut; whole documents need nothing
    first, last = documents.at(own[:, 0]), documents.at(own[:, 1] - 1)
    two = first != last
    document = np.concatenate((first, last[two]))
    begin = np.concatenate((own[:, 0], documents.offsets[last[two]]))
    end = np.minimum(np.concatenate((own[:, 1], own[two, 1])), documents.offsets[document + 1])
    low, high = documents.offsets[document], documents.offsets[document + 1]
    if documents.left >= 0:
        low = np.maximum(low, begin - documents.left)
    if documents.right >= 0:
        high = np.minimum(high, end + documents.right)
    # one line for all ranks, one after the other: seen and not owned
    stride = documents.tokens + 1
    shift = np.concatenate((ranks, ranks[two])) * stride
    points, seen = _coverage(low + shift, high + shift, own[:, 0] + ranks * stride, own[:, 1] + ranks * stride)
    rank, start, stop = points[:-1][seen] // stride, points[:-1][seen] % stride, points[1:][seen] % stride
    # cut where the owner changes
    order = np.argsort(own[:, 0])
    tiles, owners = own[order], ranks[order]
    lowest = np.searchsorted(tiles[:, 0], start, side="right") - 1
    count = np.searchsorted(tiles[:, 0], stop, side="left") - lowest
    row = np.repeat(np.arange(len(start)), count)
    tile = lowest[row] + np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    return rank[row], owners[tile], np.maximum(start[row], tiles[tile, 0]), np.minimum(stop[row], tiles[tile, 1])


def _coverage(low, high, own_low, own_high):
    """Points on a line, and for each gap between two of them whether it lies in some [low, high) and in no [own_low, own_high)."""
    points = np.unique(np.concatenate((low, high, own_low, own_high)))

    def covered(starts, stops):
        change = np.bincount(np.searchsorted(points, starts), minlength=len(points))
        change = change - np.bincount(np.searchsorted(points, stops), minlength=len(points))
        return np.cumsum(change)[:-1] > 0

    return points, covered(low, high) & ~covered(own_low, own_high)


def _passed_on(target, origin, start, stop, per_node):
    """(source, target, origin, start, stop): rows between nodes come to one rank, chosen in turn, and go on from there."""
    far = target // per_node != origin // per_node
    if not far.any():
        return origin, target, origin, start, stop
    near = tuple(x[~far] for x in (origin, target, origin, start, stop))
    target, origin, start, stop = (x[far] for x in (target, origin, start, stop))
    # ranks of a node may need different parts of a range: cut all at all their ends, so that each piece is needed whole or not at all
    ends = np.unique(np.concatenate((start, stop)))
    lowest = np.searchsorted(ends, start)
    count = np.searchsorted(ends, stop) - lowest
    row = np.repeat(np.arange(len(start)), count)
    piece = lowest[row] + np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    target, origin, start, stop = target[row], origin[row], ends[piece], ends[piece + 1]
    # the owner's counterpart in the node if it needs the piece, else the next one there that does
    distance = (target - origin) % per_node
    order = np.lexsort((distance, target // per_node, start))
    target, origin, start, stop = (x[order] for x in (target, origin, start, stop))
    leads = np.append(True, (np.diff(start) != 0) | (np.diff(target // per_node) != 0))
    source = np.where(leads, origin, target[np.flatnonzero(leads)[np.cumsum(leads) - 1]])
    return tuple(np.concatenate(pair) for pair in zip(near, (source, target, origin, start, stop), strict=True))


def _steps(phase, turn, target, tokens, slices, per_node):
    """The step of each row, and the ticks of the steps."""
    number = phase * per_node + turn
    present = np.unique(number)
    leads = {p for p in np.unique(phase[(phase > 0) & (turn > 0)]).tolist()}  # phases whose crossing is passed on
    most = max((int((part[:, 1] - part[:, 0]).sum()) for part in slices), default=0)
    step_of, sent_at, returned_at, crossing, joinable = {}, [0], [0], 0, False
    arriving = np.zeros(len(slices), dtype=np.int64)
    for n in present.tolist():
        rows = number == n
        new = np.bincount(target[rows], tokens[rows], len(slices)).astype(np.int64)
        is_crossing = n % per_node == 0 and n // per_node in leads
        if joinable and not is_crossing and (arriving + new).max() <= most:
            arriving += new
        else:
            arriving, step = new, len(sent_at)
            # a crossing is under way while its node computes on the one before it
            sent_at.append(crossing if is_crossing else step - 1)
            returned_at.append(step + 1)
            crossing, joinable = (step, False) if is_crossing else (crossing, True)
        step_of[n] = len(sent_at) - 1
    for p in leads:  # what was passed on comes back before the sum goes on
        last = max(step for n, step in step_of.items() if n // per_node == p)
        returned_at[step_of[p * per_node]] = last + 2
    return np.array([step_of[n] for n in present.tolist()], dtype=np.int64)[np.searchsorted(present, number)], sent_at, returned_at
