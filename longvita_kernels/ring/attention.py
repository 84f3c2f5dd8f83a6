"""Attention over documents that are spread over ranks, exactly.

Every rank holds the queries, keys and values of its own tokens (`plan.shard`). Keys and values travel, never queries: each rank gets the
ranges that its queries see. With S_s the keys that a rank has in step s (s = 0: its own), for each query

    lse = log Σ_s exp(lse_s)       out = Σ_s exp(lse_s − lse) · out_s              out_s, lse_s: attention to S_s alone, float32
    dq = Σ_s dq_s                  dk, dv: Σ over the ranks that saw a key          shares taken with the final out and lse: they just add

What arrives in step s + 1 is under way while step s computes. The backward sends keys and values again, so memory holds two steps' worth,
and returns float32 shares of dk and dv the way the keys came; each is added at a fixed moment, so bits do not depend on timing.

T: tokens of this rank. H, J: query heads, KV heads; H % J == 0. D: head dimension.
Sources: Liu et al. 2023 "Ring Attention"; the merge: Milakov & Gimelshein 2018; all-to-all: Jacobs et al. 2023 "DeepSpeed Ulysses".
"""

import math

import torch

from longvita_kernels.ops import _common
from longvita_kernels.ops.merge_attention import merge_attention
from longvita_kernels.ring import all_to_all, partial, transport
from longvita_kernels.ring.cost import CostModel
from longvita_kernels.ring.plan import ContextParallelPlan
from longvita_kernels.ring.ranges import put, take

MODES = ("auto", "ring", "all_to_all")
AGREEING = "ring_attention, comparing arguments"  # the step in which nothing of the call itself travels
LAG = 4  # ticks that a rank computes on while gradients have not left, or have not come back: so many steps' may wait in memory


@_common.breaks_graph
def ring_attention(q, k, v, plan, *, group=None, softmax_scale=None, return_lse=False, mode="auto", cost=None):
    """`varlen_attention` over the plan's documents, each rank holding its own tokens. Every rank of the group must call it, and backward.

    q (T, Hq, D), k, v (T, Hkv, D)   this rank's tokens, as `plan.shard` gives them; dtypes, heads and strides as in `varlen_attention`
    plan            from `plan_context_parallel`, the same on all ranks; it has the mask
    group           a torch.distributed group (gloo on CPUs, NCCL on GPUs) of plan.world_size ranks; None: the default group
    softmax_scale   default 1 / sqrt(D)
    mode            ring        keys and values travel to the ranks whose queries see them
                    all_to_all  heads are exchanged for tokens (Ulysses): for head counts, Hkv too, that the number of ranks divides
                    auto        what `cost` says is faster, ring where the heads do not divide
    cost            CostModel with the machine's rates; the same on all ranks
    → out (T, Hq, D) in q's dtype; with return_lse also lse (Hq, T), float32, differentiable.

    Works under no_grad, autocast and activation checkpointing. ValueError for arguments that do not fit, on every rank, before anything is
    sent: the first call of a kind compares plans, shapes and dtypes. RuntimeError, within the group's time-out, naming peer and step, when
    a rank is gone or hangs (NCCL: at 90 % of it, before its watchdog ends the process; the peer is one of those of that step).
    """
    group = transport.of(group, q.device)
    q, k, v = _common.autocast_tensors(q, k, v)
    problem = _problem(q, k, v, plan, group, softmax_scale, mode)
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None or problem else float(softmax_scale)
    if problem is None and mode == "auto":
        mode = (CostModel() if cost is None else cost).choose(plan, q.shape[1], k.shape[1], q.shape[2], q.dtype)
    _agree(q, k, v, plan, group, scale, mode, problem)
    if mode == "ring":
        out, lse = _Ring.apply(q, k, v, plan, group, scale)
    else:
        out, lse = all_to_all.attention(q, k, v, plan, group, scale, return_lse)
    return (out, lse) if return_lse else out


def _problem(q, k, v, plan, group, softmax_scale, mode):
    """What is wrong with this rank's arguments, as a ValueError, or None."""
    try:
        if not isinstance(plan, ContextParallelPlan):
            raise ValueError(f"plan is a {type(plan).__name__}; expected what plan_context_parallel returns")
        plan.check_group(group)
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; expected one of {', '.join(MODES)}")
        _common.attention_options(None, None, softmax_scale, 1)
        _common.check_shape("q", q, (int(plan.tokens[group.rank]), None, None), "(T, Hq, D), T the tokens that the plan gives this rank")
        _common.check_float("q", q)
        _common.check_head_dim("q", q.shape[2])
        _common.check_shape("k", k, (q.shape[0], None, q.shape[2]), "(T, Hkv, D), T and D those of q")
        _common.check_shape("v", v, k.shape, "the shape of k")
        for name, x in (("q", q), ("k", k), ("v", v)):
            _common.check_like(name, x, "q", q)
            _common.check_last_stride(name, x)
        if q.shape[1] < 1 or k.shape[1] < 1 or q.shape[1] % k.shape[1]:
            raise ValueError(f"q has {q.shape[1]} heads and k has {k.shape[1]}; expected the query heads to be a multiple of the KV heads")
        if mode == "all_to_all" and not all_to_all.divides(plan, q.shape[1], k.shape[1]):
            raise ValueError(
                f"mode 'all_to_all' spreads {q.shape[1]} query and {k.shape[1]} KV heads over {plan.world_size} ranks, which must divide "
                "both; use mode='ring'"
            )
    except ValueError as error:
        return error
    return None


_FACTS = ("arguments that fit", "plan", "query heads", "KV heads", "head dimension", "dtype", "softmax_scale", "mode", "gradients wanted")


def _agree(q, k, v, plan, group, scale, mode, problem):
    """Raise on every rank if one has other arguments. Ranks that know each other's from an earlier call exchange nothing."""
    if problem is not None and (not isinstance(plan, ContextParallelPlan) or any(name == group.name for name, _ in plan.agreed)):
        raise problem  # the others compare nothing now
    wanted = [int(x.requires_grad and torch.is_grad_enabled()) for x in (q, k, v)]
    facts = (q.shape[1:], k.shape[1:], q.dtype, scale, mode, *wanted)
    if problem is None and (group.name, facts) in plan.agreed:
        return
    numbers = [0] * len(_FACTS)
    if problem is None:
        dtype = _common.FLOAT_DTYPES.index(q.dtype) if q.dtype in _common.FLOAT_DTYPES else len(_common.FLOAT_DTYPES)
        bits = torch.tensor(scale, dtype=torch.float64).view(torch.int64).item()
        wanted = wanted[0] + 2 * (wanted[1] or wanted[2])
        numbers = [1, plan.fingerprint, q.shape[1], k.shape[1], q.shape[2], dtype, bits, MODES.index(mode), wanted]
    mine = torch.tensor(numbers, dtype=torch.int64, device=q.device)
    everyone = {rank: torch.empty_like(mine) for rank in range(group.size) if rank != group.rank}
    group.exchange(AGREEING, [(rank, mine) for rank in everyone], list(everyone.items())).finish()
    if problem is not None:
        raise problem
    for rank, theirs in everyone.items():
        if (theirs := theirs.tolist()) != numbers:
            what = "arguments that do not fit" if not theirs[0] else "another " + next(
                name for name, mine, other in zip(_FACTS, numbers, theirs, strict=True) if mine != other
            )  # fmt: skip
            raise ValueError(f"rank {rank} called ring_attention with {what}, unlike rank {group.rank}; give all ranks the same")
    plan.agreed.add((group.name, facts))


# ------------------------------------------------------------------------------------------------------------------------------ the ring


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan, group, scale):
        program = plan.program(group.rank)
        ctx.plan, ctx.group, ctx.scale = plan, group, scale
        ctx.set_materialize_grads(False)  # an unused output costs nothing: its gradient arrives as None
        out, lse, lse_rest = _forward(q, k, v, plan, program, group, scale)
        ctx.save_for_backward(q, k, v, out, lse, lse_rest)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        if grad_out is None and grad_lse is None:
            return (None,) * 6
        program, saved, needs = ctx.plan.program(ctx.group.rank), ctx.saved_tensors, list(ctx.needs_input_grad[:3])
        with torch.no_grad():
            grads = _backward(ctx, grad_out, grad_lse, *saved, program, needs)
        if torch.is_grad_enabled():  # create_graph=True
            grads = [grad if grad is None else _NoSecondDerivative.apply(grad, grad_out, *saved[:3]) for grad in grads]
        return *grads, None, None, None


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, *causes):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(
            "ring_attention has no second derivative: its gradient cannot be differentiated again. Remedy: call backward or autograd.grad "
            "without create_graph=True"
        )


def _forward(q, k, v, plan, program, group, scale):
    """out (q's dtype), lse and its rest."""
    calls = sum(len(step.calls) for step in program.steps)
    wide = partial.dtype_of(q)
    traffic = _Traffic(k, v, plan.routes, program, group, "ring_attention, forward")
    out = total = None  # total: the log-sum-exp so far in float64. Rounded at every merge, its errors would show in the gradients
    for tick, step in enumerate(program.steps):
        traffic.advance(tick)
        for call in step.calls:
            keys, values = traffic.take(tick, call.keys)
            part, lse, rest = partial.forward(take(q, call.queries), keys, values, call, scale, q.dtype if calls == 1 else wide)
            if out is None:  # the own keys, which all queries see: nothing to merge with yet
                out, total = part, lse.double() + rest
                continue
            before = take(total.T, call.queries).T
            merged, _ = merge_attention(take(out, call.queries), before.to(wide), part, lse)
            put(out, call.queries, merged)
            put(total.T, call.queries, torch.logaddexp(before, lse.double() + rest).T)
    traffic.finish()
    if out is None:  # no tokens
        out, total = q.new_zeros(q.shape), q.new_zeros((q.shape[1], 0), dtype=torch.float64)
    lse = total.to(wide)
    return out.to(q.dtype), lse, (total - lse).nan_to_num_(0.0).to(wide)  # a row that saw nothing: −inf, nothing left


def _backward(ctx, grad_out, grad_lse, q, k, v, out, lse, lse_rest, program, needs):
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
    traffic = _Traffic(k, v, ctx.plan.routes, program, ctx.group, "ring_attention, backward", gradients=needs[1] or needs[2])
    dq = q.new_zeros(q.shape, dtype=partial.dtype_of(q)) if needs[0] else None
    for tick in range(traffic.ticks):
        traffic.advance(tick)
        for call in program.steps[tick].calls if tick < len(program.steps) else ():
            queries = call.queries
            rows = [take(x, queries) for x in (grad_out, q, out)]
            of_lse = [None if x is None else take(x.T, queries).T for x in (grad_lse, lse, lse_rest)]
            keys, values = traffic.take(tick, call.keys)
            dkv = [traffic.gradients(tick)[:, i - 1] if needs[i] else None for i in (1, 2)]
            partial.backward(rows[0], of_lse[0], rows[1], keys, values, rows[2], *of_lse[1:], call, ctx.scale, dq, *dkv)
    traffic.finish()
    dkv = traffic.gradients(0) if needs[1] or needs[2] else None
    return [
        dq.to(q.dtype) if needs[0] else None,
        dkv[:, 0].to(k.dtype) if needs[1] else None,
        dkv[:, 1].to(v.dtype) if needs[2] else None,
    ]


class _Traffic:
    """The keys and values, and in a backward their gradients, that one rank sends and receives in one call, tick by tick.

    `advance(t)` waits for what tick t needs and starts what leaves at it; then step t is computed on. Keys and values travel as one tensor
    (tokens, 2, J, D), so that a stretch of tokens is one stretch of memory. Where sends may wait for their receiver (`group.eager`), own
    keys leave at the start: a rank that is long over a step of its own holds nobody up.
    """

    def __init__(self, k, v, routes, program, group, name, gradients=False):
        self.k, self.v, self.routes, self.program, self.group, self.name, self.returns = k, v, routes, program, group, name, gradients
        sent = sum(message.tokens for messages in program.sends for message in messages if message.own)
        self.buffers = {0: torch.stack((k, v), 1)} if sent > program.tokens else {}  # else what is sent is put together piece by piece
        self.sums, self.returned = {}, {}  # by step: gradients that this rank adds up; that come back to it
        self.keys, self.gradients_coming, self.under_way, self.early = {}, {}, [], []
        self.steps = range(1, len(program.steps))
        self.ticks = max(routes.returned_at) + LAG + 2 if gradients else len(program.steps)
        for step in self.steps if group.eager else ():
            messages = [message for message in program.sends[step] if message.own]
            self.early.append(self._send(step, messages, []))

    def advance(self, tick):
        if tick in self.keys:
            self.keys.pop(tick).wait()
        for step in [s for s in self.gradients_coming if self.routes.returned_at[s] < tick - LAG]:
            self._add_returned(step)
        for began, transfers in self.under_way:
            if began < tick - LAG:
                transfers.finish()
        self.under_way = [entry for entry in self.under_way if entry[0] >= tick - LAG]
        for step in self._at(self.routes.sent_at, tick):
            self._send_keys(step, tick)
        for step in self._at(self.routes.returned_at, tick) if self.returns else ():
            self._return_gradients(step, tick)
        for step in [s for s, last in self.program.last_use.items() if last < tick]:
            self.buffers.pop(step, None)

    def take(self, step, ranges):
        """(keys, values) of these ranges of a step's buffer."""
        if step == 0:
            return take(self.k, ranges), take(self.v, ranges)
        rows = take(self.buffers[step], ranges)
        return rows[:, 0], rows[:, 1]

    def gradients(self, step):
        """(tokens, 2, J, D) float32: what this rank knows so far of the gradients of a step's keys and values."""
        if step not in self.sums:
            shape = (self.program.steps[step].tokens, 2, *self.k.shape[1:])
            self.sums[step] = self.k.new_zeros(shape, dtype=partial.dtype_of(self.k))
        return self.sums[step]

    def finish(self):
        for transfers in [*self.early, *(transfers for _, transfers in self.under_way)]:
            transfers.finish()

    def _at(self, ticks, tick):
        return [step for step in self.steps if ticks[step] == tick]

    def _send_keys(self, step, tick):
        into = self.program.steps[step]
        buffer = self.buffers[step] = self.k.new_empty((into.tokens, 2, *self.k.shape[1:]))
        messages = [message for message in self.program.sends[step] if not (message.own and self.group.eager)]
        self.keys[step] = self._send(step, messages, [(peer, buffer[a:b]) for peer, a, b in into.sources])
        self.under_way.append((tick, self.keys[step]))

    def _return_gradients(self, step, tick):
        own, messages = self.gradients(step), self.program.sends[step]
        for passed_on in [s for s in self.gradients_coming if any(m.takes_from(step) for m in self.program.sends[s])]:
            self._add_returned(passed_on)
        sends = [(peer, own[a:b]) for peer, a, b in self.program.steps[step].sources]
        parts = self.returned[step] = [own.new_empty((message.tokens, *own.shape[1:])) for message in messages]
        receives = [(message.peer, part) for message, part in zip(messages, parts, strict=True)]
        self.gradients_coming[step] = self.group.exchange(f"{self.name}, gradients of step {step}", sends, receives, tag=2 * step + 1)
        self.under_way.append((tick, self.gradients_coming[step]))

    def _send(self, step, messages, receives):
        sends = [(message.peer, self._gather(message)) for message in messages]
        return self.group.exchange(f"{self.name}, keys of step {step}", sends, receives, tag=2 * step)

    def _gather(self, message):
        parts = [
            self.buffers[buffer][a:b] if buffer in self.buffers else torch.stack((self.k[a:b], self.v[a:b]), 1)
            for a, b, buffer in message.pieces
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _add_returned(self, step):
        self.gradients_coming.pop(step).wait()
        for message, part in zip(self.program.sends[step], self.returned.pop(step), strict=True):
            at = 0
            for a, b, buffer in message.pieces:
                self.gradients(buffer)[a:b] += part[at : at + b - a]
                at += b - a
        self.sums.pop(step, None)
