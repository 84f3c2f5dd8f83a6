"""python -m tests.ring.processes FOLDER quick|slow

Eight gloo processes run all cases, in groups of 2, 3, 4 and 8; rank 0 writes what they found.
torch is loaded once, then the process forks. The last case kills a process, so nothing comes after it.
"""

import datetime
import functools
import itertools
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from longvita_kernels import backends, plan_context_parallel, ring_attention
from longvita_kernels.ring import all_to_all
from longvita_kernels.ring.attention import _FACTS
from tests.ring.support import on_one, shards, tensors, with_gradients

WORLD, SIZES, SECONDS, FACTS = 8, (2, 3, 4, 8), 30, len(_FACTS)
PATIENCE = datetime.timedelta(seconds=300)  # of every group but one; a new group would not take it from the default one
SHORT = [(37 * i) % 41 for i in range(150)]  # 0 to 40, several times each
NAMES = ("out", "lse", "dq", "dk", "dv")
LONG, WINDOW = {"lengths": [1009]}, {"window_size": (70, -1)}
CASES = {
    "one document": LONG,
    "one document, not causal": {**LONG, "causal": False},
    "hundreds of documents": {"lengths": SHORT},
    "lengths 0 and 1, primes": {"lengths": [0, 1, 487, 1, 0, 3, 251, 0, 7, 1]},
    "fewer tokens than ranks": {"lengths": [1, 0, 1]},
    "window": {"lengths": [613, 0, 211], **WINDOW},
    "window on both sides": {"lengths": [401, 300], "causal": False, "window_size": (60, 45)},
    "zigzag": {"lengths": [509, 100, 31], "layout": "zigzag"},
    "contiguous": {"lengths": [300, 409], "layout": "contiguous"},
    "nodes of two": {"lengths": [907, 50], "ranks_per_node": 2},
    "nodes of two, window": {"lengths": [907, 50], "ranks_per_node": 2, **WINDOW},
    "all to all": {"lengths": [500, 3, 77], "mode": "all_to_all", "heads": (16, 8)},
}
SLOW = {
    "long document": {"lengths": [9001], "dim": 64},
    "mixture": {"lengths": [5003, 17, 0, 800, 1, 1200, 64, 64, 3001], "dim": 64},
    "mixture, nodes of four": {"lengths": [5003, 17, 0, 800, 1, 1200, 64, 64, 3001], "dim": 64, "ranks_per_node": 4},
    "mixture, window": {"lengths": [5003, 17, 0, 800, 1, 1200, 64, 64, 3001], "dim": 64, "window_size": (1500, -1)},
}


class Process:
    """One of the processes: its rank, and the groups that it belongs to, by their size."""

    def __init__(self, folder, rank):
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD, timeout=PATIENCE
        )  # fmt: skip
        self.folder, self.rank, self.found, self.sent = Path(folder), rank, {}, 0
        self.groups = {size: dist.new_group(range(size), timeout=PATIENCE) for size in SIZES}
        self.impatient = dist.new_group(range(3), timeout=datetime.timedelta(seconds=SECONDS))
        start = dist.batch_isend_irecv

        def counted(operations):
            self.sent += sum(op.tensor.numel() * op.tensor.element_size() for op in operations if op.op is dist.isend)
            return start(operations)

        dist.batch_isend_irecv = counted

    def note(self, name, **facts):
        if self.rank == 0:
            self.found[name] = facts


def attention(plan, group, mode="ring"):
    return lambda q, k, v: ring_attention(q, k, v, plan, group=group, return_lse=True, mode=mode)


def whole(plan, group, result):
    return [plan.unshard(x.T if name == "lse" else x, group) for name, x in zip(NAMES, result, strict=True)]


def compare(process, name, size, lengths, heads=(10, 2), dim=32, mode="ring", dtype=torch.float32, **options):
    """Errors of a group against one process, and bytes counted against those that the plan foretells."""
    group, rank = process.groups[size], process.rank
    if rank >= size:
        return
    if options.get("ranks_per_node", 1) > size or size % options.get("ranks_per_node", 1) or (mode == "all_to_all" and heads[1] % size):
        return
    plan = plan_context_parallel([0, *itertools.accumulate(lengths)], size, **options)
    inputs = tensors(plan.total_tokens, heads, dim, dtype)
    mine = shards(plan, inputs, rank)
    process.sent = 0
    got = with_gradients(attention(plan, group, mode), mine[:3], mine[3:])
    sent = process.sent - 8 * FACTS * (size - 1)  # the comparison of arguments
    got = whole(plan, group, got)
    if mode == "ring":
        foretold = sum(plan.bytes_sent(rank, heads[1], dim, dtype, backward=b) for b in (False, True))
    else:
        foretold = sum(all_to_all.bytes_sent(plan, rank, *heads, dim, dtype, backward=b, lse=True) for b in (False, True))
    wrong = torch.tensor(int(sent != foretold))
    dist.all_reduce(wrong, group=group)
    if rank == 0:
        keep = {key: options[key] for key in ("causal", "window_size") if key in options}
        want = on_one(plan, inputs, **keep)
        want = [x.T if n == "lse" else x for n, x in zip(NAMES, want, strict=True)]
        process.note(f"{size}: {name}", wrong_bytes=int(wrong), errors={n: _error(a, b) for n, a, b in zip(NAMES, got, want, strict=True)})
        if dtype == torch.bfloat16:
            with backends.use("reference"):
                exact = on_one(plan, [x.double() for x in inputs], **keep)
            exact = [x.T if n == "lse" else x for n, x in zip(NAMES, exact, strict=True)]
            ratios = [float((a.double() - c).norm() / (b.double() - c).norm()) for a, b, c in zip(got, want, exact, strict=True)]
            process.note(f"{size}: {name}, errors over those of one process", **dict(zip(NAMES, ratios, strict=True)))


def _error(a, b):
    return float((a - b).abs().nan_to_num(float("inf")).max()) if a.numel() else 0.0


def repeat(process, size, runs):
    """Bit-equal over runs, in two layouts."""
    if process.rank >= size:
        return
    for layout in ("balanced", "zigzag"):
        plan = plan_context_parallel([0, 301, 301, 700, 1024], size, layout=layout)
        mine = shards(plan, tensors(plan.total_tokens, (4, 2), 32, torch.bfloat16), process.rank)
        first, differing = None, 0
        for _ in range(runs):
            got = with_gradients(attention(plan, process.groups[size]), mine[:3], mine[3:])
            first = first or got
            differing += any(not torch.equal(a, b) for a, b in zip(first, got, strict=True))
        total = torch.tensor(differing)
        dist.all_reduce(total, group=process.groups[size])
        process.note(f"repeated, {layout}", differing=int(total))


def circumstances(process, size):
    """Checkpointing, no_grad, inputs that want no gradient, outputs that nobody uses, unshard's gradient."""
    if process.rank >= size:
        return
    group, plan = process.groups[size], plan_context_parallel([0, 200, 203, 400], size)
    mine = shards(plan, tensors(plan.total_tokens, (4, 2), 32), process.rank)
    function = attention(plan, group)
    plain = with_gradients(function, mine[:3], mine[3:])
    again = with_gradients(lambda *x: checkpoint(function, *x, use_reentrant=False), mine[:3], mine[3:])
    with torch.no_grad():
        silent = function(*mine[:3])
    with torch.inference_mode():
        inferred = function(*mine[:3])
    q, k, v, g, _ = mine
    q = q.clone().requires_grad_()
    only_q = torch.autograd.grad(ring_attention(q, k, v, plan, group=group, mode="ring"), q, g)[0]
    v = v.clone().requires_grad_()
    only_v = torch.autograd.grad(ring_attention(q.detach(), k, v, plan, group=group, mode="ring"), v, g)[0]
    no_lse = with_gradients(
        lambda *x: (ring_attention(*x, plan, group=group, mode="ring"), x[0].sum() * 0), mine[:3], (g, torch.tensor(1.0))
    )
    local = torch.ones(len(g), 2, requires_grad=True)
    weight = torch.arange(plan.total_tokens)[:, None] * (1.0 + process.rank)
    (plan.unshard(local, group) * weight).sum().backward()
    ranks = sum(1.0 + rank for rank in range(size))
    process.note(
        "circumstances",
        checkpoint=all(torch.equal(a, b) for a, b in zip(plain, again, strict=True)),
        no_grad=all(torch.equal(a, b) for a, b in zip(plain, silent, strict=False)),
        inference=all(torch.equal(a, b) for a, b in zip(plain, inferred, strict=False)),
        frozen=torch.equal(only_q, no_lse[2]) and torch.equal(only_v, no_lse[4]),
        unshard=torch.allclose(local.grad, plan.shard(torch.arange(plan.total_tokens)[:, None] * ranks, process.rank).expand_as(local)),
    )  # fmt: skip


def mismatches(process):
    """Two ranks with different arguments: both say so before anything is sent."""
    if process.rank >= 2:
        return
    odd, group = process.rank == 1, process.groups[2]
    q, k = torch.zeros(50, 4, 32), torch.zeros(50, 2, 32)

    def says(name, change=None, **options):
        plan = plan_context_parallel([0, 100], 2, causal=not (odd and change == "plan"))
        x, y = (
            (q.bfloat16(), k.bfloat16()) if odd and change == "dtype" else (q[..., :24], k[..., :24]) if odd and change == "dim" else (q, k)
        )
        x = x[:-1] if odd and change == "tokens" else x
        process.sent = 0
        try:
            ring_attention(x, y, y, plan, group=group, **options)
            said = "nothing"
        except ValueError as error:
            said = str(error)
        everyone = [None, None]
        dist.all_gather_object(everyone, f"{said} [{process.sent} bytes]", group=group)
        process.note(f"mismatch, {name}", said=everyone)

    says("plan", "plan")
    says("dtype", "dtype")
    says("head dimension", "dim")
    says("tokens", "tokens")
    says("scale", softmax_scale=1.0 if odd else 2.0)


def agreements(process, size):
    """The hash is exchanged once a plan, not once a call."""
    if process.rank >= size:
        return
    plan = plan_context_parallel([0, 64], size)
    mine = shards(plan, tensors(64, (2, 1), 32), process.rank)
    process.sent = 0
    for _ in range(3):
        with_gradients(attention(plan, process.groups[size]), mine[:3], mine[3:])
    sent = [plan.bytes_sent(process.rank, 1, 32, torch.float32, backward=b) for b in (False, True)]
    process.note("agreements", bytes=process.sent - 3 * sum(sent), once=8 * FACTS * (size - 1))


def lost(process, name, members, group, lost_rank, how):
    """After one good call, one rank is lost in the next: what the others say."""
    if process.rank not in members:
        return
    plan = plan_context_parallel([0, 1024], len(members))
    mine = shards(plan, tensors(1024, (2, 1), 32), process.rank)
    with_gradients(attention(plan, group), mine[:3], mine[3:])
    if process.rank == lost_rank:
        return how()
    try:
        with_gradients(attention(plan, group), mine[:3], mine[3:])
        said = "nothing"
    except RuntimeError as error:
        said = str(error)
    (process.folder / f"{name}-{process.rank}.txt").write_text(said.splitlines()[0])
    (process.folder / f"{name}-{process.rank}.done").touch()


def hang(process):
    """Until the others have given up, however long that takes them."""
    while not all((process.folder / f"hung-{rank}.done").exists() for rank in range(2)):
        time.sleep(0.1)


def main(folder, what):
    torch.set_num_threads(1)
    children = []
    for rank in range(WORLD):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                run(Process(folder, rank), what)
                code = 0
            except BaseException:  # a child must not go on as its parent
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)  # gloo aborts now and then when its peers have gone
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    sys.exit(0 if codes == [0] * (WORLD - 1) + ([0] if what == "slow" else [-signal.SIGKILL]) else f"exit codes {codes}")


def run(process, what):
    for size in SIZES:
        for name, case in (SLOW if what == "slow" else CASES).items():
            compare(process, name, size, **case)
    compare(process, "bf16", 8, [3001, 2, 700] if what == "slow" else [1201, 2, 300], heads=(4, 2), dim=64, dtype=torch.bfloat16)
    repeat(process, 4, 20 if what == "slow" else 5)
    if what == "quick":
        circumstances(process, 4)
        mismatches(process)
        agreements(process, 3)
    if process.rank == 0:
        (process.folder / "found.json").write_text(json.dumps(process.found))
    dist.barrier()
    if what == "quick":
        lost(process, "hung", range(3), process.impatient, 2, functools.partial(hang, process))
        dist.barrier()
        lost(process, "killed", range(WORLD), process.groups[WORLD], WORLD - 1, lambda: os.kill(os.getpid(), signal.SIGKILL))


if __name__ == "__main__":
    main(*sys.argv[1:])
