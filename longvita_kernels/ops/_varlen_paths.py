"""varlen_attention on other people's kernels: what a GPU runs where none of ours is verified yet, and flash-attn for those who have it.

    forward(backend, q, k, v, cu_q, cu_k, …) → out (T, H, D), lse (H, T) and what its rounding lost, "rest" (H, T)
    backward(backend, grad_out, grad_lse, q, …) → dq, dk, dv

backend "torch": the flash kernels inside torch (those of torch.nn.attention.varlen) where they can take the call: 16 bits on a GPU from
sm_80 on, no softcap. Otherwise plain matmuls over some query rows at a time, with float32 sums, on any device; those read the offsets
back. backend "flash_attn": the package of that name. Neither has a gradient of lse, or results in float32, as ring attention adds them
up; where one is asked for, the plain way gives it.

R: query rows of a block, J: KV heads, G: query heads of a group, L: keys that a block may see, D: head dimension.
"""

import itertools

import torch

from longvita_kernels.ops._products import product

_BLOCK_SCORES = 1 << 26  # elements of a block of scores


def forward(backend, q, k, v, cu_q, cu_k, max_q, max_k, scale, left, right, softcap, deterministic, result):
    if result not in (None, q.dtype) or (backend == "torch" and not _torch_has_flash(q, scale, softcap)):
        return blocked_forward(q, k, v, cu_q, cu_k, scale, left, right, softcap, result)
    max_q, max_k = q.shape[0] if max_q < 0 else max_q, k.shape[0] if max_k < 0 else max_k
    if backend == "torch":
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_q, cu_k, max_q, max_k, 0.0, _is_causal(left, right), False, scale=scale, window_size_left=left,
            window_size_right=right,
        )  # fmt: skip
    else:
        from flash_attn.flash_attn_interface import flash_attn_varlen_func

        out, lse, _ = flash_attn_varlen_func(
            q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=_is_causal(left, right), window_size=(left, right),
            softcap=softcap, deterministic=deterministic, return_attn_probs=True,
        )  # fmt: skip
    return out, lse.masked_fill(lse == torch.inf, -torch.inf), torch.zeros_like(lse)  # theirs is +inf for a row that sees nothing


def backward(
    backend, grad_out, grad_lse, q, k, v, out, lse, rest, cu_q, cu_k, max_q, max_k, scale, left, right, softcap, deterministic
):  # fmt: skip
    if grad_lse is not None or (backend == "torch" and not _torch_has_flash(q, scale, softcap)):
        grads = blocked_backward(grad_out, grad_lse, q, k, v, out, lse, rest, cu_q, cu_k, scale, left, right, softcap)
        return tuple(grad.to(q.dtype) for grad in grads)
    max_q, max_k = q.shape[0] if max_q < 0 else max_q, k.shape[0] if max_k < 0 else max_k
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    if backend == "torch":
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the state of dropout
        return torch.ops.aten._flash_attention_backward(
            grad_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, 0.0, _is_causal(left, right), unused, unused[:0], scale=scale,
            window_size_left=left, window_size_right=right,
        )  # fmt: skip
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _flash_attn_varlen_backward(
        grad_out, q, k, v, out, lse, *grads, cu_q, cu_k, max_q, max_k, dropout_p=0.0, softmax_scale=scale,
        causal=_is_causal(left, right), window_size_left=left, window_size_right=right, softcap=softcap, alibi_slopes=None,
        deterministic=deterministic,
    )  # fmt: skip
    return grads


def _is_causal(left, right):
    return left < 0 and right == 0


def _torch_has_flash(q, scale, softcap):
    return (
        q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and softcap == 0 and scale > 0 and q.numel() > 0
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------- plain matmuls


def blocked_forward(q_THD, k_TJD, v_TJD, cu_q, cu_k, scale, left, right, softcap, result=None):
    """out in `result` (None: the dtype of q), lse and its rest."""
    out = torch.zeros(q_THD.shape, dtype=result or q_THD.dtype, device=q_THD.device)
    kv_heads, wide = k_TJD.shape[1], torch.promote_types(q_THD.dtype, torch.float32)
    lse = torch.full((q_THD.shape[1], q_THD.shape[0]), -torch.inf, dtype=wide, device=q_THD.device)
    rest = torch.zeros_like(lse)
    for rows, keys, seen in _blocks(cu_q, cu_k, q_THD, left, right):
        scores, _ = _scores(_by_group(q_THD[rows], kv_heads), _by_head(k_TJD[keys]), seen, scale, softcap)
        peak = scores.amax(-1, keepdim=True)
        peak = peak.masked_fill(peak == -torch.inf, 0.0)
        weights = (scores - peak).exp()
        total = weights.sum(-1, keepdim=True)
        logs = total.log()
        sums = peak + logs
        values = product(weights.to(q_THD.dtype), _by_head(v_TJD[keys])) / total.masked_fill(total == 0.0, 1.0)
        out[rows] = _by_token(values, q_THD.shape[1]).to(out.dtype)
        lse[:, rows] = sums.reshape(q_THD.shape[1], -1)
        rest[:, rows] = (logs - (sums - peak)).nan_to_num(0.0).reshape(q_THD.shape[1], -1)
    return out, lse, rest


def blocked_backward(grad_THD, grad_lse_HT, q_THD, k_TJD, v_TJD, out_THD, lse_HT, rest_HT, cu_q, cu_k, scale, left, right, softcap):
    """dq, dk and dv in float32. out and lse (+ rest, what its rounding lost) may be those of more keys than these (ring attention's): then
    these are the keys' shares."""
    heads, kv_heads, dtype = q_THD.shape[1], k_TJD.shape[1], q_THD.dtype
    dq, dk, dv = (torch.zeros(x.shape, dtype=lse_HT.dtype, device=x.device) for x in (q_THD, k_TJD, v_TJD))
    shift_HT = lse_HT.masked_fill(lse_HT == -torch.inf, torch.inf)  # a row that saw nothing: every weight is 0
    delta_HT = torch.zeros_like(lse_HT) if grad_THD is None else (grad_THD.to(lse_HT.dtype) * out_THD).sum(-1).T
    delta_HT = delta_HT if grad_lse_HT is None else delta_HT - grad_lse_HT
    for rows, keys, seen in _blocks(cu_q, cu_k, q_THD, left, right):
        q, k, v = _by_group(q_THD[rows], kv_heads), _by_head(k_TJD[keys]), _by_head(v_TJD[keys])
        scores, slope = _scores(q, k, seen, scale, softcap)
        weights = ((scores - _of_rows(shift_HT, rows, kv_heads)) - _of_rows(rest_HT, rows, kv_heads)).exp()
        dscores = -_of_rows(delta_HT, rows, kv_heads)
        if grad_THD is not None:
            grad = _by_group(grad_THD[rows], kv_heads).to(dtype)
            dv[keys] += product(weights.to(dtype).transpose(1, 2), grad).transpose(0, 1)
            dscores = dscores + product(grad, v.transpose(1, 2))
        dscores = (weights * dscores * slope * scale).to(dtype)
        dq[rows] = _by_token(product(dscores, k), heads)
        dk[keys] += product(dscores.transpose(1, 2), q).transpose(0, 1)
    return dq, dk, dv


def _blocks(cu_q, cu_k, q, left, right):
    """(rows, keys, which of the keys each row sees) of every block of query rows that sees any key."""
    for (start, end), (start_k, end_k) in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True):
        length, offset = end_k - start_k, (end_k - start_k) - (end - start)
        block = max(16, _BLOCK_SCORES // max(1, q.shape[1] * length))
        for first in range(0, end - start, block):
            last = min(first + block, end - start)
            low = max(0, first + offset - left) if left >= 0 else 0
            high = min(length, last + offset + right) if right >= 0 else length
            if low < high:
                distance = torch.arange(low, high, device=q.device) - torch.arange(first + offset, last + offset, device=q.device)[:, None]
                seen = torch.ones_like(distance, dtype=torch.bool) if left < 0 else distance >= -left
                seen &= distance <= right if right >= 0 else True
                yield slice(start + first, start + last), slice(start_k + low, start_k + high), seen


def _scores(q_JRD, k_JLD, seen, scale, softcap):
    """Scores (J, G · R, L), −inf where hidden, and the derivative of the cap."""
    scores, slope = product(q_JRD, k_JLD.transpose(1, 2)) * scale, 1.0
    if softcap > 0:
        capped = torch.tanh(scores / softcap)
        scores, slope = softcap * capped, 1 - capped.square()
    return scores.masked_fill(~seen.repeat(scores.shape[1] // seen.shape[0], 1), -torch.inf), slope


def _of_rows(x_HT, rows, kv_heads):
    """A number for each row of a block of scores (J, G · R, L), as (J, G · R, 1)."""
    return x_HT[:, rows].reshape(kv_heads, -1, 1)


def _by_group(x_RHD, kv_heads):
    """(R, H, D) → (J, G · R, D)."""
    return x_RHD.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _by_head(x_LJD):
    return x_LJD.transpose(0, 1)


def _by_token(x_JRD, heads):
    """(J, G · R, D) → (R, H, D)."""
    group = heads // x_JRD.shape[0]
    return x_JRD.unflatten(1, (group, -1)).permute(2, 0, 1, 3).flatten(1, 2)
