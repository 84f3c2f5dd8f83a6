"""What every launcher shares: block sizes by architecture, and how many programs a persistent grid has."""

import functools
import os
from typing import NamedTuple

import torch
import triton

# Read once, like @triton.jit reads it when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Blocks(NamedTuple):
    """Rows and columns of a tile, and how it is launched. per_sm: programs per multiprocessor of a persistent grid."""

    m: int
    n: int
    warps: int
    stages: int
    per_sm: int = 2


@functools.cache
def capability(device):
    """10 · major + minor of a GPU; 0 where the interpreter runs the kernels on CPU tensors."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def programs(device, items, per_sm):
    """Size of a persistent grid over `items` pieces of work; each program takes several where there are more."""
    return max(1, min(items, per_sm * _multiprocessors(device)))


def by_capability(table, wanted):
    """table[capability], of the newest architecture in the table that is not newer than `wanted`."""
    return table[max((key for key in table if key <= wanted), default=min(table))]


def power_of_2(size):
    """The smallest power of 2 that holds `size`, at least 16: what tl.dot and tl.arange ask for."""
    return max(16, triton.next_power_of_2(size))
