"""python -m bench ring --tokens 16384 --processes 2

Ring attention on processes of this machine against one process on one thread, which does the same work alone, and against a plain zigzag
ring. All stand in the same rounds, forward + backward, one after the other; the ideal is the time of one process divided by their number.
What is wrong, or sends other bytes than foretold, gets no time. --simulate computes larger machines instead (bench/ring_simulation.py).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from bench import machine, report, ring_simulation
from bench.ring_peer import Zigzag
from longvita_kernels import plan_context_parallel, ring_attention, varlen_attention
from longvita_kernels.ring import all_to_all, transport
from longvita_kernels.ring.attention import AGREEING
from longvita_kernels.ring.cost import CostModel
from longvita_kernels.ring.peer_copies import PeerCopies

TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 1e-1)}  # of out, of gradients: largest difference from one process
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One set of documents, causal."""

    label: str
    lengths: list[int]
    dtype: torch.dtype
    heads: int
    kv_heads: int
    dim: int

    @property
    def flops(self) -> int:
        """Forward + backward: 14 for every visible pair, head and dimension."""
        return 14 * sum(n * (n + 1) // 2 for n in self.lengths) * self.heads * self.dim


def cases(tokens: int, heads: int, kv_heads: int, dim: int, dtypes: tuple[torch.dtype, ...]) -> list[Case]:
    lengths = {"one document": [tokens], "documents of 4K": [4096] * (tokens // 4096), "mixture": ring_simulation.mixture(tokens)}
    return [
        Case(label=label, lengths=found, dtype=dtype, heads=heads, kv_heads=kv_heads, dim=dim)
        for label, found in lengths.items() if found for dtype in dtypes
    ]  # fmt: skip


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench ring", description=__doc__.split("\n\n")[1], epilog=f"Example: {__doc__.splitlines()[0]}"
    )
    parser.add_argument("--simulate", action="store_true", help="compute 8 to 512 ranks from stated rates; writes the table and the plot")
    parser.add_argument(
        "--emulate", type=int, metavar="RANKS", help="only compute: all steps of so many ranks, one after the other, no transfers"
    )
    parser.add_argument("--processes", type=int, default=2, help="how many (default 2)")
    parser.add_argument("--tokens", type=int, default=16384, help="of all documents together (default 16384)")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose label has this text")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="only this one")
    parser.add_argument("--heads", type=int, nargs=2, default=(4, 2), metavar=("Q", "KV"), help="query and KV heads (default 4 2)")
    parser.add_argument("--dim", type=int, default=64, help="head dimension (default 64)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts (default 3)")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="measure zigzag and all-to-all too")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: NCCL with a GPU a process, CUDA IPC where they share one"
    )
    parser.add_argument("--peer-copies", action="store_true", help="tensors travel by our copies between processes (CUDA C++)")
    parser.add_argument("--flops", type=float, help="simulation: FLOP/s of attention a rank")
    parser.add_argument("--bandwidth", type=float, nargs=2, metavar=("NODE", "NETWORK"), help="simulation: bytes/s a rank")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the results to a file (simulation: bench/results/ring-simulation.json)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="simulation: where the plot goes (bench/results/ring-simulation.png)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    arguments = _arguments(argv)
    if arguments.simulate:
        return _simulate(arguments)
    dtypes = (getattr(torch, arguments.dtype),) if arguments.dtype else (torch.float32, torch.bfloat16)
    chosen = [case for case in cases(arguments.tokens, *arguments.heads, arguments.dim, dtypes) if arguments.case in case.label]
    if not chosen or arguments.processes < 2 or arguments.rounds < 1:
        print("python -m bench ring: no case fits, or fewer than 2 processes or 1 round; see --help", file=sys.stderr)
        return 2
    if arguments.emulate:
        results = [_emulate(case, arguments) for case in chosen]
    else:
        results = _on_processes(arguments.processes, chosen, arguments)
    about = {**machine.describe(arguments.device), "threads": 1}  # not before: processes are forked while this one has no CUDA context
    out = {"machine": about, "processes": arguments.emulate or arguments.processes, "results": results}
    if arguments.json:
        report.write_json(arguments.json, out)
    print(json.dumps(out, ensure_ascii=False))
    return 1 if any(result.get("problems") for result in results) else 0


def _simulate(arguments: argparse.Namespace) -> int:
    rates = {"flops": arguments.flops} if arguments.flops else {}
    if arguments.bandwidth:
        rates |= dict(zip(("node_bandwidth", "network_bandwidth"), arguments.bandwidth, strict=True))
    found = ring_simulation.report(CostModel(**rates))
    print(ring_simulation.table(found))
    report.write_json(arguments.json or RESULTS / "ring-simulation.json", found)
    ring_simulation.plot(arguments.plot or RESULTS / "ring-simulation.png", found)
    return 0


# --------------------------------------------------------------------------------------------------------------------------- processes


def _on_processes(count: int, chosen: list[Case], arguments: argparse.Namespace) -> list[dict]:
    """Forks, before any thread has started, so that torch is loaded once; rank 0 hands back what was found."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(count):
            if (child := os.fork()) == 0:
                code = 1
                try:
                    _member(rank, count, Path(folder), chosen, arguments)
                    code = 0
                except BaseException:  # a child must not go on as its parent
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            raise RuntimeError(f"the processes ended with {codes}; what they said is above")
        return json.loads((Path(folder) / "found.json").read_text())


def _member(rank, count, folder, chosen, arguments):
    torch.set_num_threads(1)
    gpus = torch.cuda.device_count() if arguments.device == "cuda" else 0
    if arguments.device == "cuda":
        torch.cuda.set_device(rank % gpus)
    nccl = gpus >= count and not arguments.peer_copies
    dist.init_process_group("nccl" if nccl else "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
    if arguments.peer_copies:
        group = PeerCopies()
    elif arguments.device == "cuda" and not nccl:
        from bench.cuda_ipc import CudaIpc

        group = CudaIpc()
    else:
        group = transport.of(None, torch.device(arguments.device))
    found = [_measure(case, group, arguments) for case in chosen]
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()


class _Counted:
    """A group that counts the bytes it sends."""

    def __init__(self, group):
        self.group, self.sent = group, 0
        self.rank, self.size, self.name, self.eager = group.rank, group.size, group.name, group.eager

    def exchange(self, step, sends, receives, tag=0):
        if step != AGREEING:
            self.sent += sum(tensor.numel() * tensor.element_size() for _, tensor in sends)
        return self.group.exchange(step, sends, receives, tag)


def _tensors(case, device):
    generator = torch.Generator(device).manual_seed(0)
    sizes = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    return [torch.randn(sum(case.lengths), n, case.dim, generator=generator, device=device).to(case.dtype) for n in sizes]


def _both_ways(function, inputs):
    """A call of function(q, k, v) forward and backward: (out, dq, dk, dv)."""
    *leaves, grad = inputs
    leaves = [x.detach().requires_grad_() for x in leaves]

    def call():
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    return call


def _alone(case, inputs):
    cu = torch.tensor([0, *case.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(inputs[0].device)
    longest = max(case.lengths)
    return _both_ways(lambda q, k, v: varlen_attention(q, k, v, cu, max_seqlen_q=longest, max_seqlen_k=longest), inputs)


def _measure(case, group, arguments):
    """Check, then time everything in the same rounds; on rank 0 the result, printed as well."""
    plan = plan_context_parallel([0, *torch.tensor(case.lengths).cumsum(0).tolist()], group.size)
    inputs, shape = _tensors(case, arguments.device), (case.heads, case.kv_heads, case.dim, case.dtype)
    mine = [plan.shard(x, group.rank) for x in inputs]
    counted = _Counted(group)

    def ours(mode):
        return _both_ways(lambda q, k, v: ring_attention(q, k, v, plan, group=counted, mode=mode), mine)

    calls = {"one process": _alone(case, inputs), "ring": ours("ring")}
    foretold = {"ring": sum(plan.bytes_sent(group.rank, *shape[1:], backward=b) for b in (False, True))}
    if arguments.peers and all_to_all.divides(plan, *shape[:2]):
        calls["all to all"] = ours("all_to_all")
        foretold["all to all"] = sum(all_to_all.bytes_sent(plan, group.rank, *shape, backward=b) for b in (False, True))
    if arguments.peers and arguments.device == "cpu" and not arguments.peer_copies:
        zigzag = Zigzag(case.lengths, group.group)
        calls["zigzag ring"] = _both_ways(zigzag.attention, [zigzag.shard(x) for x in inputs])
        foretold["zigzag ring"] = zigzag.bytes_sent(case.kv_heads, case.dim, case.dtype)
    # name → (who counts its bytes, what takes a rank's share of a tensor)
    means = {name: (zigzag, zigzag.shard) if name == "zigzag ring" else (counted, lambda x: plan.shard(x, group.rank)) for name in foretold}
    problems = _check(case, group.rank, calls, foretold, means)
    if problems:
        return _say(case, {"problems": problems}, group.rank)
    samples = {name: [] for name in calls}
    for _ in range(arguments.rounds):
        for name, call in calls.items():
            samples[name].append(_timed(call if name != "one process" or group.rank == 0 else lambda: None, arguments.device))
    medians, busy = ({name: statistics.median(s[i] for s in values) for name, values in samples.items()} for i in (0, 1))
    # ratios within a round: a shared machine changes speed from one to the next
    ratios, of_busy = (
        {name: statistics.median(s[i] * group.size / one[i] for s, one in zip(values, samples["one process"], strict=True))
         for name, values in samples.items() if name != "one process"} for i in (0, 1)
    )  # fmt: skip
    sent = {name: _total(size, torch.int64) for name, size in foretold.items()}
    facts = {
        "seconds": medians,
        "times_ideal": ratios,
        "cpu_seconds": busy,
        "cpu_times_ideal": of_busy,
        "bytes": sent,
        "imbalance": plan.imbalance,
        "rounds": arguments.rounds,
    }
    return _say(case, facts, group.rank)


def _check(case, rank, calls, foretold, means):
    """What is wrong with any of the calls on the very tensors that are timed, as found by any rank."""
    problems = []
    whole = calls["one process"]()
    for name, (counter, share) in means.items():
        calls[name]()  # whatever happens only once
        counter.sent = 0
        there = share(torch.ones_like(whole[0][:, :1, :1]))  # 0 where the peer has padding: what it makes of that is nobody's
        got = [x * there for x in calls[name]()]
        if counter.sent != foretold[name]:
            problems.append(f"{name}: rank {rank} sent {counter.sent} bytes, foretold were {foretold[name]}")
        for i, (a, b) in enumerate(zip(got, map(share, whole), strict=True)):
            error, limit = float((a - b).abs().max()) if a.numel() else 0.0, TOLERANCES[case.dtype][min(i, 1)]
            if not error <= limit:
                problems.append(f"{name}: rank {rank}, {('out', 'dq', 'dk', 'dv')[i]} differs by {error:.2e} from one process")
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, problems)
    return sum(everyone, [])


def _timed(call, device):
    """Seconds until the last rank is done, all having started together; and the processor time of the busiest, which other programs on the
    machine lengthen less."""
    dist.barrier()
    start, busy = time.perf_counter(), time.process_time()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    took = time.perf_counter() - start, time.process_time() - busy
    return [_total(seconds, torch.float64, dist.ReduceOp.MAX) for seconds in took]


def _total(number, dtype, operation=dist.ReduceOp.SUM):
    tensor = torch.tensor(number, dtype=dtype, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(tensor, op=operation)
    return tensor.item()


def _say(case, facts, rank):
    dtype = str(case.dtype).removeprefix("torch.")
    result = {"case": case.label, "dtype": dtype, "heads": [case.heads, case.kv_heads], "dim": case.dim, "lengths": len(case.lengths),
              "tokens": sum(case.lengths), "flops": case.flops, **facts}  # fmt: skip
    if rank == 0:
        print(f"{case.label}, {sum(case.lengths):,} tokens, {dtype}")
        for problem in facts.get("problems", ()):
            print(f"    REFUSED: {problem}")
        for name, seconds in facts.get("seconds", {}).items():
            ratio = ""
            if name in facts["times_ideal"]:
                ratio = f"{facts['times_ideal'][name]:6.3f} × ideal ({facts['cpu_times_ideal'][name]:.3f} of processor time)"
            sent = f"{facts['bytes'][name] / 1e6:10.2f} MB sent" if name in facts["bytes"] else ""
            print(f"    {name:14s} {seconds:8.3f} s {case.flops / seconds / 1e9:10.1f} GFLOP/s {ratio:46s} {sent}")
        sys.stdout.flush()
    return result


# ---------------------------------------------------------------------------------------------------------------------------- emulation


class _NoTransfers:
    """One rank of a group that is not there: what would arrive is random already."""

    name, eager = "nobody", True

    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def exchange(self, step, sends, receives, tag=0):
        for _, tensor in receives:
            tensor.normal_() if tensor.is_floating_point() else tensor.copy_(sends[0][1])
        return self

    def wait(self):
        return None

    finish = wait


def _emulate(case, arguments):
    """How much the cut into steps and parts costs: one process's time over the sum of all ranks' computing, no transfers."""
    torch.set_num_threads(1)
    ranks, inputs = arguments.emulate, _tensors(case, arguments.device)
    plan = plan_context_parallel([0, *torch.tensor(case.lengths).cumsum(0).tolist()], ranks)
    calls = {"one process": _alone(case, inputs)}
    for rank in range(ranks):
        group, mine = _NoTransfers(rank, ranks), [plan.shard(x, rank) for x in inputs]
        calls[f"rank {rank}"] = _both_ways(lambda q, k, v, group=group: ring_attention(q, k, v, plan, group=group, mode="ring"), mine)
    seconds = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(arguments.rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if arguments.device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    slowest = max(value for name, value in medians.items() if name != "one process")
    efficiency = medians["one process"] / ranks / slowest
    print(f"{case.label}, {sum(case.lengths):,} tokens, {case.dtype}: compute alone {efficiency:.3f} of ideal on {ranks} ranks", flush=True)
    return {"case": case.label, "dtype": str(case.dtype).removeprefix("torch."), "tokens": sum(case.lengths), "seconds": medians,
            "compute_efficiency": efficiency}  # fmt: skip
