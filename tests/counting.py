"""Work that is counted, not timed: what a test can hold to a limit on a busy machine as well. Times are measured in `bench/`."""

import sys
import tracemalloc


def calls(function):
    """How many functions, written in Python or built in, are called while `function()` runs in this thread."""
    count, before = 0, sys.getprofile()

    def note(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count


def peak_bytes(function):
    """The most memory that Python objects and numpy arrays held at one time while `function()` ran, above what they held before."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        function()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
