"""Context parallelism as data: which rank owns which tokens of the packed documents, and which keys it gets from whom.

    plan = plan_context_parallel(cu_seqlens, world_size)
    local = plan.shard(x, rank)              # this rank's tokens, in the order of their packed positions
    x = plan.unshard(local, group)           # all of them again
    print(plan)                              # who owns and who receives what

A plan depends on its arguments alone, so every rank makes the same one by itself.
"""

import functools
import hashlib
import math

import numpy as np
import torch

from longvita_kernels.ops import _common
from longvita_kernels.ring import layouts, transport
from longvita_kernels.ring.programs import write_program
from longvita_kernels.ring.ranges import put
from longvita_kernels.ring.routes import find_routes

LAYOUTS = ("balanced", "zigzag", "contiguous")


def plan_context_parallel(cu_seqlens, world_size, *, causal=True, window_size=(-1, -1), layout="balanced", ranks_per_node=None):
    """Spread packed documents over `world_size` ranks. → ContextParallelPlan

    cu_seqlens      int32 (n_docs + 1,), or a sequence of ints: document n has tokens cu[n]:cu[n+1]. Any lengths, also 0; nothing is padded
    causal, window_size   what a query sees, as in `varlen_attention`
    layout          balanced    equal tokens, equal attention area, little to send (the default)
                    zigzag      every document in 2·world_size pieces, rank r owning the r-th and the r-th from the end
                    contiguous  equal stretches of the packed row
                    In all three the numbers of tokens differ by one at most.
    ranks_per_node  ranks r // ranks_per_node share a node. `balanced` keeps documents inside nodes as far as it can, and in every layout
                    keys cross to a node once and are passed on there. None: all ranks are alike

    ValueError for offsets that fall, do not start at 0, or arguments that do not fit.
    """
    offsets = _checked_offsets(cu_seqlens)
    if not isinstance(world_size, int) or world_size < 1:
        raise ValueError(f"world_size is {world_size!r}; expected the number of ranks, at least 1")
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; expected one of {', '.join(LAYOUTS)}")
    per_node = world_size if ranks_per_node is None else ranks_per_node
    if not isinstance(per_node, int) or per_node < 1 or world_size % per_node:
        raise ValueError(f"ranks_per_node is {per_node!r}; expected a divisor of world_size = {world_size}, or None")
    left, right, *_ = _common.attention_options(window_size, None, None, 1)
    documents = layouts.Documents(offsets, left, 0 if causal else right)
    if layout == "balanced":
        slices = layouts.balanced(documents, world_size, per_node)
    else:
        slices = getattr(layouts, layout)(documents, world_size)
    return ContextParallelPlan(documents, slices, layout, per_node)


def _checked_offsets(cu_seqlens):
    if isinstance(cu_seqlens, torch.Tensor):
        cu_seqlens = _common.as_offsets("cu_seqlens", cu_seqlens)
        _common.check_cu_seqlens("cu_seqlens", cu_seqlens, cu_seqlens.device)
        cu_seqlens = cu_seqlens.cpu().numpy()
    offsets = np.asarray(cu_seqlens)
    if offsets.ndim != 1 or len(offsets) < 1 or offsets.dtype.kind not in "iu":
        raise ValueError(f"cu_seqlens is {cu_seqlens!r}; expected (n_docs + 1,) integers, the offsets of the documents, at least [0]")
    offsets = offsets.astype(np.int64)
    if offsets[0] != 0 or (np.diff(offsets) < 0).any():
        at = int(np.argmax(np.diff(offsets) < 0)) + 1
        wrong = f"starts at {offsets[0]}; expected 0" if offsets[0] else f"falls from {offsets[at - 1]} to {offsets[at]} at index {at}"
        raise ValueError(f"cu_seqlens {wrong}; document offsets begin at 0 and must not decrease")
    return offsets


class ContextParallelPlan:
    """Who owns and who needs what; made by `plan_context_parallel`, never changed.

    slices[rank]   (n, 2) array: the packed ranges that the rank owns, in order; a shard is these, end to end
    """

    def __init__(self, documents, slices, layout, ranks_per_node):
        self.documents, self.slices, self.layout, self.ranks_per_node = documents, slices, layout, ranks_per_node
        self.world_size = len(slices)
        self._programs, self.agreed, self.choices = {}, set(), {}  # kept by ring_attention: what ranks found to be the same; modes by cost

    # ------------------------------------------------------------------------------------------------------------------------ figures

    @property
    def total_tokens(self):
        return self.documents.tokens

    @functools.cached_property
    def tokens(self):
        """Tokens of each rank."""
        return np.array([int((part[:, 1] - part[:, 0]).sum()) for part in self.slices], dtype=np.int64)

    @functools.cached_property
    def areas(self):
        """Visible (query, key) pairs of each rank's queries, one head."""
        before = self.documents.area_before
        return np.array([int((before(part[:, 1]) - before(part[:, 0])).sum()) for part in self.slices], dtype=np.int64)

    @property
    def imbalance(self):
        """Largest attention area of a rank over the mean; 1 is perfect."""
        return _over_mean(self.areas)

    @property
    def token_imbalance(self):
        """Most tokens of a rank over the mean; 1 is perfect."""
        return _over_mean(self.tokens)

    @functools.cached_property
    def routes(self):
        """Which ranges of keys travel, from whom to whom, in which step."""
        return find_routes(self.documents, self.slices, self.ranks_per_node)

    def key_ranges(self, rank):
        """(n, 2): the packed ranges of keys that the rank receives: what its queries see and it does not own."""
        rows = self.routes.target == self._checked(rank)
        return layouts.joined(np.stack((self.routes.start[rows], self.routes.stop[rows]), axis=1))

    def tokens_sent(self, rank, *, across_nodes=None):
        """Tokens whose keys and values the rank sends in one forward; only those that leave the node (True) or stay in it (False)."""
        return self._tokens(self.routes.source == self._checked(rank), across_nodes)

    def tokens_received(self, rank, *, across_nodes=None):
        """The same, received."""
        return self._tokens(self.routes.target == self._checked(rank), across_nodes)

    def _tokens(self, rows, across_nodes):
        routes = self.routes
        if across_nodes is not None:
            rows = rows & ((routes.source // self.ranks_per_node != routes.target // self.ranks_per_node) == across_nodes)
        return int((routes.stop[rows] - routes.start[rows]).sum())

    def bytes_sent(self, rank, n_kv_heads, head_dim, dtype, *, backward=False):
        """Bytes that the rank sends in one forward of `ring_attention` (mode "ring"), or in one backward: keys and values again, and the
        float32 gradients of those it received."""
        each = 2 * n_kv_heads * head_dim
        sent = self.tokens_sent(rank) * each * dtype.itemsize
        gradient = torch.promote_types(dtype, torch.float32).itemsize
        return sent + self.tokens_received(rank) * each * gradient if backward else sent

    # ------------------------------------------------------------------------------------------------------------------------ tensors

    def shard(self, x, rank, dim=0):
        """The rank's part of `x`, which has all tokens along `dim`; differentiable. One contiguous slice is a view."""
        if x.shape[dim] != self.total_tokens:
            raise ValueError(f"x has {x.shape[dim]} entries along dimension {dim}; expected the {self.total_tokens} tokens of the plan")
        parts = [x.narrow(dim, a, b - a) for a, b in self.slices[self._checked(rank)].tolist()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0)

    @_common.breaks_graph
    def unshard(self, local, group=None):
        """All tokens, in packed order, from every rank's `local` (tokens first). Every rank of the group must call it and gets the result.

        Differentiable: each rank's gradient is the sum, over all ranks, of what they did with its tokens.
        """
        group = transport.of(group, local.device)
        self.check_group(group)
        if local.shape[0] != self.tokens[group.rank]:
            raise ValueError(f"local has {local.shape[0]} tokens; expected the {self.tokens[group.rank]} that rank {group.rank} owns")
        return _Unshard.apply(local, self, group)

    def joined(self, shards):
        """All tokens, in packed order, from the shards of all ranks, by rank."""
        whole = shards[0].new_empty((self.total_tokens, *shards[0].shape[1:]))
        for ranges, shard in zip(self.slices, shards, strict=True):
            put(whole, ranges.tolist(), shard)
        return whole

    def position_ids(self, rank, device=None):
        """(tokens of the rank,) int64: each token's position in its document."""
        positions = [np.arange(a, b) for a, b in self.slices[self._checked(rank)].tolist()]
        packed = np.concatenate(positions) if positions else np.zeros(0, dtype=np.int64)
        return torch.from_numpy(packed - self.documents.offsets[self.documents.at(packed)]).to(device)

    # ------------------------------------------------------------------------------------------------------------------- for the op

    def program(self, rank):
        """What the rank does in `ring_attention`, step by step."""
        if rank not in self._programs:
            self._programs[rank] = write_program(self.documents, self.slices[self._checked(rank)], self.routes, rank)
        return self._programs[rank]

    @functools.cached_property
    def fingerprint(self):
        """63 bits that two ranks share only if their plans are the same."""
        documents = self.documents
        facts = [documents.left, documents.right, self.world_size, self.ranks_per_node, *(len(part) for part in self.slices)]
        digest = hashlib.sha256(np.array(facts, dtype=np.int64).tobytes())
        for array in (documents.offsets, *self.slices):
            digest.update(np.ascontiguousarray(array).tobytes())
        return int.from_bytes(digest.digest()[:8], "little") >> 1

    def check_group(self, group):
        """ValueError unless the group has as many ranks as the plan."""
        if group.size != self.world_size:
            raise ValueError(f"the plan is for {self.world_size} ranks but the group has {group.size}; plan with world_size={group.size}")

    def _checked(self, rank):
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank is {rank}; expected 0 to {self.world_size - 1}, the plan's ranks")
        return rank

    # ------------------------------------------------------------------------------------------------------------------------ to look at

    def draw(self, width=96):
        """The packed row as text, a line a rank: █ what it owns, ░ keys that it receives; ┊ where documents begin."""
        scale = width / max(self.total_tokens, 1)

        def marks(ranges, line, mark):
            for a, b in ranges.tolist():
                first = min(int(a * scale), width - 1)
                line[first : max(first + 1, math.ceil(b * scale))] = mark * (max(first + 1, math.ceil(b * scale)) - first)
            return line

        ruler = [" "] * width
        for offset in self.documents.offsets[:-1].tolist():
            ruler[min(int(offset * scale), width - 1)] = "┊"
        name = max(4, len(str(self.world_size - 1)))
        lines = [str(self), " " * name + "  " + "".join(ruler).rstrip()]
        for rank in range(self.world_size):
            line = marks(self.slices[rank], marks(self.key_ranges(rank), ["·"] * width, "░"), "█")
            lines.append(f"{rank:{name}}  {''.join(line)}  {self.tokens[rank]} own, {self.tokens_received(rank)} received")
        return "\n".join(lines)

    def __str__(self):
        nodes = self.world_size // self.ranks_per_node
        return (
            f"{self.total_tokens} tokens, {len(self.documents.lengths)} documents, {self.world_size} ranks"
            f"{f' on {nodes} nodes' if nodes > 1 else ''}, {self.layout}: "
            f"area {self.imbalance:.3f}, tokens {self.token_imbalance:.3f} × the mean"
        )


def _over_mean(figures):
    return float(figures.max() / figures.mean()) if figures.any() else 1.0


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local, plan, group):
        ctx.plan, ctx.group = plan, group
        local = local.contiguous()
        shards = [local if rank == group.rank else local.new_empty((n, *local.shape[1:])) for rank, n in enumerate(plan.tokens.tolist())]
        peers = [rank for rank in range(plan.world_size) if rank != group.rank]
        sends = [(rank, local) for rank in peers] if len(local) else []
        group.exchange("unshard", sends, [(rank, shards[rank]) for rank in peers if len(shards[rank])]).finish()
        return plan.joined(shards)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        plan, group = ctx.plan, ctx.group
        peers = [rank for rank in range(plan.world_size) if rank != group.rank]
        own = plan.shard(grad, group.rank).to(torch.promote_types(grad.dtype, torch.float32))
        found = {rank: grad.new_empty(own.shape) for rank in peers}
        sends = [(rank, plan.shard(grad, rank).contiguous()) for rank in peers if plan.tokens[rank]]
        group.exchange("unshard, backward", sends, list(found.items()) if len(own) else []).finish()
        found[group.rank] = own
        return sum(found[rank].to(own.dtype) for rank in range(plan.world_size)).to(grad.dtype), None, None
