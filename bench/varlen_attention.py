"""Packed attention against SDPA per document, SDPA with a dense mask, and FlexAttention compiled (forward; it has no backward on CPUs)."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench.harness import OURS, Case, Setup, best_peer, generator, gradients, share
from longvita_kernels import testing, varlen_attention

DENSE_LIMIT = 4096  # tokens: above, a T × T mask only wastes everybody's time
CHECK_PAIRS = 1 << 24  # visible pairs of one head above which only one KV head is checked


# ------------------------------------------------------------------------------------------------------------------------- what is right


def in_blocks(q, k, v, cu_seqlens, grad, causal, dtype, heads, block=512):
    """Forward and backward of the definition in a dtype, some rows at a time: what a long document leaves no memory for otherwise.

    heads: KV heads to compute. → out (T, len(heads) · group, D) and, with grad, dq likewise and dk, dv (T, len(heads), D)
    """
    group, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5
    columns = torch.cat([torch.arange(h * group, (h + 1) * group) for h in heads])
    wide = torch.promote_types(dtype, torch.float32)  # sums over blocks
    out, dq = (torch.zeros(q.shape[0], len(columns), q.shape[2], dtype=dtype) for _ in range(2))
    dk, dv = (torch.zeros(k.shape[0], len(heads), k.shape[2], dtype=wide) for _ in range(2))
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        for j, head in enumerate(heads):
            at = slice(j * group, (j + 1) * group)
            k_LD, v_LD = k[start:end, head].to(dtype), v[start:end, head].to(dtype)
            for low in range(0, end - start, block):
                high = min(low + block, end - start)
                seen = high if causal else end - start
                rows = slice(start + low, start + high)
                q_RD = q[rows, columns[at]].to(dtype).flatten(0, 1)
                scores_RL = q_RD @ k_LD[:seen].T * scale
                if causal:
                    position = torch.arange(low, high).repeat_interleave(group)
                    scores_RL.masked_fill_(torch.arange(seen) > position[:, None], -math.inf)
                weights_RL = torch.softmax(scores_RL, -1)
                out_RD = weights_RL @ v_LD[:seen]
                out[rows, at] = out_RD.unflatten(0, (-1, group))
                if grad is None:
                    continue
                g_RD = grad[rows, columns[at]].to(dtype).flatten(0, 1)
                ds_RL = weights_RL * (g_RD @ v_LD[:seen].T - (g_RD * out_RD).sum(-1, keepdim=True)) * scale
                dq[rows, at] = (ds_RL @ k_LD[:seen]).unflatten(0, (-1, group))
                keys = slice(start, start + seen)
                dk[keys, j] += ds_RL.T @ q_RD
                dv[keys, j] += weights_RL.T @ g_RD
    return (out,) if grad is None else (out, dq, dk.to(dtype), dv.to(dtype))


def problems(q, k, v, cu_seqlens, grad, causal, pairs):
    """What breaks the accuracy rule, on these tensors; of a large problem only the last KV head with its group is checked."""
    heads = range(k.shape[1]) if pairs <= CHECK_PAIRS else [k.shape[1] - 1]
    if grad is None:
        got = (varlen_attention(q, k, v, cu_seqlens, causal=causal),)
    else:
        leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
        out = varlen_attention(*leaves, cu_seqlens, causal=causal)
        got = (out.detach(), *torch.autograd.grad(out, leaves, grad))
    if len(heads) < k.shape[1]:  # the last head's
        got = [x[:, -x.shape[1] // k.shape[1] :] for x in got]
    ref = in_blocks(q, k, v, cu_seqlens, grad, causal, torch.float64, heads)
    base = in_blocks(q, k, v, cu_seqlens, grad, causal, q.dtype, heads)
    names = ("out", "grad q", "grad k", "grad v")
    rule = varlen_attention_tolerance(q.dtype)
    found = [(name, testing.violation(*x, rule[name])) for name, *x in zip(names, got, ref, base, strict=False)]
    return [f"{name}: {problem}" for name, problem in found if problem]


def varlen_attention_tolerance(dtype):
    from longvita_kernels.ops.varlen_attention import SPEC

    return {name: SPEC.tolerance(name, dtype) for name in ("out", "grad q", "grad k", "grad v")}


# --------------------------------------------------------------------------------------------------------------------------------- peers


def per_document(cu_seqlens, causal):
    """SDPA in a loop over the documents."""
    bounds = list(itertools.pairwise(cu_seqlens.tolist()))

    def attend(q, k, v):
        outs = []
        for a, b in bounds:
            q_HLD, k_HLD, v_HLD = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
            outs.append(F.scaled_dot_product_attention(q_HLD, k_HLD, v_HLD, is_causal=causal, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(outs)

    return attend


def batched(length, causal):
    """SDPA over documents of one length as a batch: the peer that needs no loop."""

    def attend(q, k, v):
        q_NHLD, k_NHLD, v_NHLD = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q_NHLD, k_NHLD, v_NHLD, is_causal=causal, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    return attend


def _documents(cu_seqlens):
    return torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1), cu_seqlens.diff())


def dense_mask(cu_seqlens, causal):
    """SDPA over everything with a T × T mask."""
    document = _documents(cu_seqlens)
    mask = document[:, None] == document
    mask = mask.tril() if causal else mask

    def attend(q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return attend


def gpu_peers(cu_seqlens, longest, causal):
    """What a GPU may have besides: torch's varlen_attn, cuDNN per document, flash-attn. name → function of q, k, v."""
    window, found = (-1, 0) if causal else (-1, -1), {}
    if importlib.util.find_spec("torch.nn.attention.varlen"):
        from torch.nn.attention.varlen import varlen_attn

        grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
        options = {"window_size": window} if "window_size" in inspect.signature(varlen_attn).parameters else {"is_causal": causal}
        found["torch varlen_attn"] = lambda q, k, v: varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **grouped, **options)
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_varlen_func

        found["flash-attn"] = lambda q, k, v: flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=causal)
    attend = per_document(cu_seqlens, causal)

    def cudnn(q, k, v):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return attend(q, k, v)

    return found | {"cuDNN per document": cudnn}


@functools.cache
def _compiled_flex():
    return torch.compile(flex_attention, dynamic=False)


def flex(cu_seqlens, causal):
    """FlexAttention, compiled, its block mask made beforehand."""
    document, tokens = _documents(cu_seqlens), int(cu_seqlens[-1])

    def visible(b, h, i, j):
        same = document[i] == document[j]
        return same & (i >= j) if causal else same

    mask = create_block_mask(visible, None, None, tokens, tokens, device=cu_seqlens.device)

    def attend(q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return _compiled_flex()(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return attend


# --------------------------------------------------------------------------------------------------------------------------------- cases


def _build(lengths, heads, dim, causal, dtype, backward, pairs):
    random = generator()
    tokens, (query_heads, kv_heads) = sum(lengths), heads
    qkv = torch.randn(tokens, query_heads + 2 * kv_heads, dim, generator=random).to(dtype)
    q, k, v = qkv.split([query_heads, kv_heads, kv_heads], dim=1)
    grad = torch.randn(tokens, query_heads, dim, generator=random).to(dtype) if backward else None
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    functions = {OURS: lambda q, k, v: varlen_attention(q, k, v, cu_seqlens, causal=causal)}
    on_gpu = cu_seqlens.is_cuda
    functions["SDPA per document"] = per_document(cu_seqlens, causal)
    if on_gpu and dtype != torch.float32:
        functions |= gpu_peers(cu_seqlens, max(lengths), causal)
    if len(lengths) > 1 and len(set(lengths)) == 1:
        functions["SDPA batched (equal lengths)"] = batched(lengths[0], causal)
    if len(lengths) > 1 and tokens <= DENSE_LIMIT:
        functions["SDPA, dense mask"] = dense_mask(cu_seqlens, causal)
    if len(set(lengths)) > 1 and dtype == torch.bfloat16 if on_gpu else not backward:  # on a GPU half a minute of compiling for each shape
        functions["FlexAttention compiled"] = flex(cu_seqlens, causal)
    if backward:
        calls = {name: gradients(function, (q, k, v), grad) for name, function in functions.items()}
    else:
        calls = {name: functools.partial(function, q, k, v) for name, function in functions.items()}
    return Setup(calls=calls, check=lambda: problems(q, k, v, cu_seqlens, grad, causal, pairs))


def _cases_of(label, lengths, heads, dim, dtype, shares, *, causal=True, heavy=False, peers=(1.0, 1.0)):
    """Forward, forward + backward; shares, peers: least share of the ceiling (None: no goal) and least ratio to the best peer of each."""
    pairs = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    forward_flops = 4 * pairs * heads[0] * dim
    size = torch.finfo(dtype).bits // 8 * sum(lengths) * dim
    for direction, factor, moved, least, ratio in (
        ("forward", 1.0, 2 * heads[0] + 2 * heads[1], shares[0], peers[0]),
        # backward: 2.5 × forward, the five products that it needs
        ("forward + backward", 3.5, 5 * heads[0] + 6 * heads[1], shares[1], peers[1]),
    ):
        goals = (best_peer(ratio),) if least is None else (share(least), best_peer(ratio))
        build = functools.partial(_build, lengths, heads, dim, causal, dtype, direction != "forward", pairs)
        yield Case(
            op="varlen_attention", label=f"{label}, {heads[0]}/{heads[1]} × {dim}", dtype=dtype, direction=direction,
            flops=int(forward_flops * factor), bytes=size * moved, ceiling="mm", build=build, goals=goals, heavy=heavy,
        )  # fmt: skip


def cases() -> Iterator[Case]:
    bf16, f32 = torch.bfloat16, torch.float32
    for heads in ((10, 2), (8, 2), (40, 8)):
        for length, shares in ((512, (0.82, 0.78)), (2048, (0.92, 0.88)), (8192, (0.95, 0.90))):
            heavy = heads == (40, 8) and length > 512
            yield from _cases_of(f"one document of {length:,}", (length,), heads, 128, bf16, shares, heavy=heavy)
    yield from _cases_of("one document of 2,048", (2048,), (8, 8), 128, bf16, (0.85, 0.80))
    for length in (2048, 8192):
        yield from _cases_of(f"one document of {length:,}", (length,), (10, 2), 128, f32, (1.0, 0.9))
    mixed = (700, 300, 1500, 96, 1500)
    yield from _cases_of(f"packed {mixed}", mixed, (8, 2), 128, bf16, (0.80, 0.75), peers=(3.0, 1.0))
    yield from _cases_of(f"packed {mixed}", mixed, (8, 2), 128, f32, (None, None))
    yield from _cases_of("32 documents of 64", (64,) * 32, (8, 2), 128, bf16, (0.35, None))
    yield from _cases_of("16 documents of 128", (128,) * 16, (8, 2), 128, bf16, (0.50, None))
    yield from _cases_of("8 tiles of 1,025 (ViT, not causal)", (1025,) * 8, (16, 16), 64, bf16, (0.80, 0.75), causal=False)
    yield from _cases_of("8 tiles of 1,025 (ViT, not causal)", (1025,) * 8, (16, 16), 64, f32, (None, None), causal=False)


def cuda_cases() -> Iterator[Case]:
    """Shapes of a model's size: Qwen2.5-14B's heads in training and prefill, and the image encoder's tiles."""
    bf16, none = torch.bfloat16, (None, None)
    for length in (8192, 16384, 32768, 131072):
        yield from _cases_of(f"one document of {length:,}", (length,), (40, 8), 128, bf16, none, heavy=length > 32768)
    mixed = (9000, 700, 300, 14000, 96, 5000, 1500, 2172)
    yield from _cases_of("packed, 32,768 tokens in 8 documents", mixed, (40, 8), 128, bf16, none)
    yield from _cases_of("packed, 16,384 tokens in 6 documents", (7000, 5000, 700, 3000, 300, 384), (40, 8), 128, bf16, none)
    yield from _cases_of("256 documents of 128", (128,) * 256, (40, 8), 128, bf16, none)
    yield from _cases_of("96 tiles of 1,025 (ViT, not causal)", (1025,) * 96, (16, 16), 64, bf16, none, causal=False)
    yield from _cases_of("packed, 32,768 tokens in 8 documents", mixed, (40, 8), 128, torch.float16, none)
    yield from _cases_of("one document of 4,096", (4096,), (10, 2), 128, torch.float32, none)
