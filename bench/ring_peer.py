"""The peer: a plain zigzag ring as public ones are, home-made.

Every document lies in 2 · ranks equal pieces, padded to that, and all keys pass all ranks.
Forward: keys and values go round once, W − 1 hops, whoever needs them. Backward: once more, and their float32 gradients with them, W hops.
The kernel is ours, and so is one call a hop; parts come rounded to the inputs' dtype, as such rings merge them. Causal only.
"""

import numpy as np
import torch
import torch.distributed as dist

from longvita_kernels import merge_attention


class Zigzag:
    """Documents over the ranks of a group. `tokens`: of this rank, padding included; `sent`: bytes so far."""

    def __init__(self, lengths, group):
        self.group, self.rank, self.size, self.sent = group, dist.get_rank(group), dist.get_world_size(group), 0
        piece = -(-np.array(lengths) // (2 * self.size))
        starts = np.cumsum(2 * piece) - 2 * piece
        self.lengths, self.piece, self.tokens = np.array(lengths), piece, int(2 * piece.sum())
        self.cu_both, self.cu_half = (torch.tensor([0, *np.cumsum(n)], dtype=torch.int32) for n in (2 * piece, piece))
        self.early = torch.from_numpy(np.concatenate([np.arange(s, s + p) for s, p in zip(starts, piece, strict=True)]))
        self.late = torch.from_numpy(np.concatenate([np.arange(s + p, s + 2 * p) for s, p in zip(starts, piece, strict=True)]))

    def shard(self, x):
        """This rank's pieces of x (all tokens first), zeros for padding."""
        out, offsets, at = x.new_zeros((self.tokens, *x.shape[1:])), np.cumsum(self.lengths) - self.lengths, 0
        for start, length, piece in zip(offsets.tolist(), self.lengths.tolist(), self.piece.tolist(), strict=True):
            for first in (self.rank * piece, (2 * self.size - 1 - self.rank) * piece):
                count = max(0, min(piece, length - first))
                out[at : at + count] = x[start + first : start + first + count]
                at += piece
        return out

    def attention(self, q, k, v):
        """out of this rank's tokens."""
        return _Ring.apply(q, k, v, self)

    def bytes_sent(self, kv_heads, head_dim, dtype):
        """Bytes that this rank sends in one forward and backward."""
        own = self.tokens * 2 * kv_heads * head_dim
        return 2 * (self.size - 1) * own * dtype.itemsize + self.size * own * 4

    def pass_on(self, tensor):
        """Start sending to the next rank; (what comes from the one before, the transfers)."""
        arriving = torch.empty_like(tensor)
        self.sent += tensor.numel() * tensor.element_size()
        peers = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        operations = [
            dist.P2POp(dist.isend, tensor, group=self.group, group_peer=peers[0]),
            dist.P2POp(dist.irecv, arriving, group=self.group, group_peer=peers[1]),
        ]
        return arriving, dist.batch_isend_irecv(operations)

    def part(self, hop):
        """(queries, keys, cu_q, cu_k, right limit) of a hop; None: all of them."""
        owner = (self.rank - hop) % self.size
        if hop == 0:
            return None, None, self.cu_both, self.cu_both, 0
        if owner < self.rank:
            return None, self.early, self.cu_both, self.cu_half, -1
        return self.late, None, self.cu_half, self.cu_both, -1


def _rows(x, index):
    return x if index is None else x[index]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, zigzag):
        scale, out, lse = q.shape[-1] ** -0.5, None, None
        kv = torch.stack((k, v))
        for hop in range(zigzag.size):
            following = zigzag.pass_on(kv) if hop + 1 < zigzag.size else None
            queries, keys, cu_q, cu_k, right = zigzag.part(hop)
            k_hop, v_hop = _rows(kv[0], keys), _rows(kv[1], keys)
            part = torch.ops.longvita.varlen_attention(_rows(q, queries), k_hop, v_hop, cu_q, cu_k, -1, -1, scale, -1, right, 0.0, False)
            if out is None:
                out, lse = part[0].float(), part[1]
            elif queries is None:
                out, lse = merge_attention(out, lse, part[0].float(), part[1])
            else:
                out[queries], lse[:, queries] = merge_attention(out[queries], lse[:, queries], part[0].float(), part[1])
            if following is not None:
                kv = _arrived(following)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.zigzag, ctx.scale = zigzag, scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        zigzag, kv = ctx.zigzag, torch.stack((k, v))
        dq, dkv, returning = torch.zeros_like(q, dtype=torch.float32), None, None
        for hop in range(zigzag.size):
            following = zigzag.pass_on(kv) if hop + 1 < zigzag.size else None
            queries, keys, cu_q, cu_k, right = zigzag.part(hop)
            lse_rows = lse if queries is None else lse[:, queries]
            parts = torch.ops.longvita.varlen_attention_backward(
                _rows(grad, queries), None, _rows(q, queries), _rows(kv[0], keys), _rows(kv[1], keys), _rows(out, queries), lse_rows,
                torch.zeros_like(lse_rows), cu_q, cu_k, -1, -1, ctx.scale, -1, right, 0.0, False, [True] * 3,
            )  # fmt: skip
            if queries is None:
                dq += parts[0]
            else:
                dq[queries] += parts[0]
            dkv = torch.zeros_like(kv, dtype=torch.float32) if returning is None else _arrived(returning)
            for mine, part in zip(dkv, parts[1:], strict=True):
                if keys is None:
                    mine += part
                else:
                    mine[keys] += part
            returning = zigzag.pass_on(dkv)
            if following is not None:
                kv = _arrived(following)
        dkv = _arrived(returning)
        return dq.to(q.dtype), dkv[0].to(k.dtype), dkv[1].to(v.dtype), None


def _arrived(passed):
    tensor, works = passed
    for work in works:
        work.wait()
    return tensor
