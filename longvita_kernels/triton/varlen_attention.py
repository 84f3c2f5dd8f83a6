"""Attention over packed documents on Triton: block sizes and launches (equations: ops/varlen_attention.py; kernels: _varlen_*.py).

Persistent programs take tiles of one document and one head, longest first. Nothing is read back to the host: grids follow from token and
document counts, so a call can be captured in a CUDA graph. Every element of a result is written by one program that adds in a fixed order:
bits depend neither on the run nor on the other documents of the batch. T: tokens, H, J: query and KV heads, D: head dimension.
"""

import itertools

import torch
import triton

from longvita_kernels.triton import _launch
from longvita_kernels.triton._compile import CAPABILITIES, CompileSpec
from longvita_kernels.triton._launch import Blocks
from longvita_kernels.triton._tiles import cost_kernel, scales, window
from longvita_kernels.triton._varlen_backward import keys_kernel, queries_kernel, rows_kernel
from longvita_kernels.triton._varlen_forward import forward_kernel

# Tiles by kernel, capability and (bytes per element, D as a power of 2). "keys": n is the tile of keys, m the queries it goes through.
# As large as registers allow without spilling a loop; the ones of 80 and 120 fit in 99 KiB of shared memory, as 86, 89 and 120 have it.
BLOCKS = {
    "forward": {
        80: {(2, 64): Blocks(128, 64, 8, 3), (2, 128): Blocks(128, 64, 8, 2, 1), (2, 256): Blocks(64, 32, 8, 2, 1),
             (4, 64): Blocks(64, 32, 8, 2), (4, 128): Blocks(32, 32, 8, 2), (4, 256): Blocks(32, 16, 8, 2)},
        90: {(2, 64): Blocks(128, 128, 8, 3, 1), (2, 128): Blocks(128, 64, 8, 3, 1), (2, 256): Blocks(128, 32, 8, 2, 1)},
        100: {(2, 64): Blocks(128, 64, 8, 3, 1), (2, 128): Blocks(128, 64, 8, 3, 1), (2, 256): Blocks(64, 64, 8, 1, 1)},
    },
    "keys": {
        80: {(2, 64): Blocks(64, 128, 8, 2, 1), (2, 128): Blocks(64, 64, 8, 2, 1), (2, 256): Blocks(16, 64, 8, 1, 1),
             (4, 64): Blocks(32, 32, 8, 1), (4, 128): Blocks(16, 32, 8, 1), (4, 256): Blocks(16, 16, 8, 1)},
        90: {(2, 64): Blocks(64, 128, 8, 2, 1), (2, 128): Blocks(32, 128, 8, 2, 1), (2, 256): Blocks(16, 64, 8, 2, 1)},
        100: {(2, 64): Blocks(64, 128, 8, 1, 1), (2, 128): Blocks(64, 64, 8, 1, 1), (2, 256): Blocks(32, 32, 8, 2, 1),
              (4, 64): Blocks(64, 32, 8, 1)},
    },
    "queries": {
        80: {(2, 64): Blocks(128, 64, 8, 2, 1), (2, 128): Blocks(64, 64, 8, 2, 1), (2, 256): Blocks(64, 32, 8, 1, 1),
             (4, 64): Blocks(32, 32, 8, 1), (4, 128): Blocks(16, 16, 8, 1), (4, 256): Blocks(16, 16, 8, 2)},
        90: {(2, 64): Blocks(128, 64, 8, 2, 1), (2, 128): Blocks(128, 64, 8, 2, 1), (2, 256): Blocks(64, 32, 8, 2, 1)},
        100: {(2, 64): Blocks(128, 64, 8, 2, 1), (2, 128): Blocks(128, 64, 8, 1, 1), (2, 256): Blocks(32, 32, 8, 2, 1)},
    },
}  # fmt: skip
for _table in BLOCKS.values():
    _table[120] = _table[80]
_WIDE_STRIDE = 1 << 23  # of 256 rows at most

_COST_CHUNK, _ROWS = 256, 16  # slots and rows per program of the small kernels


def _blocks(kernel, capability, dtype, dim):
    return _launch.blocks(BLOCKS[kernel], capability, (dtype.itemsize, max(64, _launch.power_of_2(dim))))


# -------------------------------------------------------------------------------------------------------------------------------- launches


def forward(q, k, v, cu_q, cu_k, scale, left, right, softcap, *, out=None):
    """out (T, H, D), lse (H, T) and its rest, float32. `out` may be given in another dtype, float32 for partial results; scale > 0."""
    q, k, v = _narrow(q, k, v)
    tokens, heads, dim = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    lse, rest = (torch.empty(heads, tokens, dtype=torch.float32, device=q.device) for _ in range(2))
    if tokens == 0:
        return out, lse, rest
    tile = _blocks("forward", _launch.capability(q.device), q.dtype, dim)
    schedule = _Schedule(cu_q, cu_k, tokens, k.shape[0], tile.m, left, right, heads, tile.per_sm)
    forward_kernel[schedule.grid](
        q, k, v, out, lse, rest, cu_q, cu_k, schedule.order, *_strides(q, k, v, out), schedule.documents, tokens, k.shape[0],
        schedule.steps, schedule.items, schedule.turns, *window(left, right), *scales(scale, softcap),
        **_shape(q, k), M=tile.m, N=tile.n, SOFTCAP=softcap > 0, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, lse, rest


def backward(grad_out, grad_lse, q, k, v, out, lse, rest, cu_q, cu_k, scale, left, right, softcap, dq, dk, dv, *, add=False):
    """Write the gradients into dq, dk and dv, each in its own dtype, or None where not needed; `add`: on top of what they hold.

    out, lse    of the whole attention, also where k and v are a part of the keys (the rest of lse is then zeros)
    grad_out, grad_lse   None: that output is not used
    """
    q, k, v = _narrow(q, k, v)
    tokens, heads, dim = q.shape
    sides, settings = (cu_q, cu_k, tokens, k.shape[0]), (scale, *scales(scale, softcap))
    stats = torch.empty(3, heads, tokens, dtype=torch.float32, device=q.device)
    grad, grad_lse_ = out if grad_out is None else _narrow(grad_out)[0], lse if grad_lse is None else grad_lse
    rows = tokens * heads
    if rows:
        rows_kernel[(triton.cdiv(rows, _ROWS),)](
            out, grad, lse, rest, grad_lse_, stats, *_strides(out, grad), *lse.stride(), *rest.stride(), *grad_lse_.stride(), tokens, rows,
            HEADS=heads, DIM=dim, BLOCK_DIM=_launch.power_of_2(dim), R=_ROWS,
            HAS_GRAD=grad_out is not None, HAS_GRAD_LSE=grad_lse is not None, num_warps=4,
        )  # fmt: skip
    common = _shape(q, k) | {"SOFTCAP": softcap > 0, "REST": q.dtype == torch.float32, "HAS_GRAD": grad_out is not None, "ADD": add}
    if k.shape[0] and (dk is not None or dv is not None):
        tile = _blocks("keys", _launch.capability(q.device), q.dtype, dim)
        schedule = _Schedule(cu_k, cu_q, k.shape[0], tokens, tile.n, right, left, k.shape[1], tile.per_sm)
        dk_, dv_ = k if dk is None else dk, v if dv is None else dv
        keys_kernel[schedule.grid](
            q, k, v, grad, stats, dk_, dv_, cu_q, cu_k, schedule.order, *_strides(q, k, v, grad, dk_, dv_), schedule.documents, *sides[2:],
            rows, schedule.steps, schedule.items, schedule.turns, *window(left, right), *settings, **common, M=tile.m, N=tile.n,
            NEED_K=dk is not None, NEED_V=dv is not None, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    if tokens and dq is not None:
        tile = _blocks("queries", _launch.capability(q.device), q.dtype, dim)
        schedule = _Schedule(*sides, tile.m, left, right, heads, tile.per_sm)
        queries_kernel[schedule.grid](
            q, k, v, grad, stats, dq, cu_q, cu_k, schedule.order, *_strides(q, k, v, grad, dq), schedule.documents, *sides[2:],
            rows, schedule.steps, schedule.items, schedule.turns, *window(left, right), *settings, **common, M=tile.m, N=tile.n,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


class _Schedule:
    """Which tiles there are, at most, and in which order persistent programs take them: the ones with most work first."""

    def __init__(self, cu_rows, cu_columns, rows, columns, block, left, right, heads, per_sm):
        self.documents = len(cu_rows) - 1
        self.steps = self.documents.bit_length()
        slots = rows // block + self.documents
        self.items = slots * heads
        programs = _launch.programs(cu_rows.device, self.items, per_sm)
        self.grid, self.turns = (programs,), triton.cdiv(self.items, programs)
        cost = torch.empty(slots, dtype=torch.int32, device=cu_rows.device)
        if slots:
            cost_kernel[(triton.cdiv(slots, _COST_CHUNK),)](
                cost, cu_rows, cu_columns, self.documents, rows, columns, self.steps, slots, *window(left, right), BLOCK=block,
                CHUNK=_COST_CHUNK,
            )  # fmt: skip
        self.order = torch.argsort(cost, descending=True)


def _shape(q, k):
    return {"HEADS": q.shape[1], "GROUP": q.shape[1] // k.shape[1], "DIM": q.shape[2], "BLOCK_DIM": _launch.power_of_2(q.shape[2])}


def _narrow(*tensors):
    """The tensors, or a dense copy of one whose tokens lie so far apart that addresses inside a tile would need 64 bits."""
    return [x if x.stride(0) < _WIDE_STRIDE else x.contiguous() for x in tensors]


def _strides(*tensors):
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


# -------------------------------------------------------------------------------------------------------------------------------- compiling

_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_FLOATS = ("scale", "scale2", "cap")
_FLOAT32, _INT32, _INT64 = ("lse_ptr", "rest_ptr", "grad_lse_ptr", "stats_ptr"), ("cu_q_ptr", "cu_k_ptr"), ("order_ptr",)


def _spec(name, kernel, dtype, capability, tile, constexprs, matrix):
    arguments = [argument for argument in kernel.arg_names if argument not in constexprs]
    kinds = {"*fp32": _FLOAT32, "*i32": _INT32, "*i64": _INT64, "fp32": _FLOATS}
    types = {argument: kind for kind, names in kinds.items() for argument in names}
    signature = {a: types.get(a) or (_TYPES[dtype] if a.endswith("_ptr") else "i32") for a in arguments}
    aligned = tuple(
        a for a in arguments if a.endswith(("_ptr", "_stride", "_head")) and not a.startswith(("cu_", "lse_", "rest_", "grad_lse_"))
    )
    return CompileSpec(
        name=name, kernel=kernel, signature=signature, constexprs=constexprs, num_warps=tile.warps, num_stages=tile.stages, matrix=matrix,
        capability=capability, aligned=aligned,
    )  # fmt: skip


def compile_specs():
    """What `make cuda-check` compiles: causal, and with everything on (window, softcap, accumulation, the other outputs unused)."""
    sizes = [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float16, 128)]
    sizes += [(torch.float32, 64), (torch.float32, 128), (torch.float32, 256)]
    for capability in CAPABILITIES:
        for (dtype, dim), everything in itertools.product(sizes, (False, True)):
            label = f"{str(dtype).removeprefix('torch.')}, D {dim}{', window, softcap' if everything else ', causal'}"
            shape = {"HEADS": 8, "GROUP": 4, "DIM": dim, "BLOCK_DIM": dim, "SOFTCAP": everything}
            gradients = shape | {"REST": dtype == torch.float32, "HAS_GRAD": True, "ADD": everything}
            rows = {"HEADS": 8, "DIM": dim, "BLOCK_DIM": dim, "R": _ROWS, "HAS_GRAD": True, "HAS_GRAD_LSE": everything}
            for part, kernel, constexprs in (
                ("forward", forward_kernel, shape),
                ("keys", keys_kernel, gradients | {"NEED_K": True, "NEED_V": True}),
                ("queries", queries_kernel, gradients),
            ):
                tile = _blocks(part, capability, dtype, dim)
                constexprs = constexprs | {"M": tile.m, "N": tile.n}
                yield _spec(f"varlen_attention {part}, {label}", kernel, dtype, capability, tile, constexprs, dtype != torch.float32)
            yield _spec(f"varlen_attention rows, {label}", rows_kernel, dtype, capability, Blocks(_ROWS, 0, 4, 1), rows, False)
        signature = {"cost_ptr": "*i32", "cu_rows_ptr": "*i32", "cu_columns_ptr": "*i32"}
        signature |= {name: "i32" for name in cost_kernel.arg_names if name not in signature}
        yield CompileSpec(
            name="varlen_attention cost", kernel=cost_kernel, signature=signature, constexprs={"BLOCK": 128, "CHUNK": _COST_CHUNK},
            num_warps=4, num_stages=1, matrix=False, capability=capability,
        )  # fmt: skip
