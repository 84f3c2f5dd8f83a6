"""Rows of a tensor by ranges (start, stop) of its first dimension: taken out, put there or added, end to end."""

import torch


def take(x, ranges):
    """The rows of these ranges; a view where there is one range."""
    if len(ranges) == 1:
        return x[ranges[0][0] : ranges[0][1]]
    return torch.cat([x[a:b] for a, b in ranges])


def put(x, ranges, rows):
    """Write rows to these ranges of x."""
    for place, part in _places(x, ranges, rows):
        place.copy_(part)


def add(x, ranges, rows):
    """Add rows to these ranges of x."""
    for place, part in _places(x, ranges, rows):
        place.add_(part)


def _places(x, ranges, rows):
    return zip((x[a:b] for a, b in ranges), rows.split([b - a for a, b in ranges]), strict=True)
