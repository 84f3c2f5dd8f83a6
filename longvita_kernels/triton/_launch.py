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


INTERPRETER_BLOCKS = Blocks(32, 16, 4, 1, 2)


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


def blocks(table, capability, key):
    """table[capability][key] of the newest architecture in the table that has it and is not newer than `capability`.

    The interpreter (capability 0) gets small tiles, so that small samples have many of them.
    """
    if capability == 0:
        return INTERPRETER_BLOCKS
    return table[max(known for known in table if known <= capability and key in table[known])][key]


def by_capability(table, wanted):
    """table[capability], of the newest architecture in the table that is not newer than `wanted`."""
    return table[max((key for key in table if key <= wanted), default=min(table))]


def power_of_2(size):
    """The smallest power of 2 that holds `size`, at least 16: what tl.dot and tl.arange ask for."""
    return max(16, triton.next_power_of_2(size))
