"""What context parallelism would cost on larger machines: plain ring, zigzag, all-gather, Ulysses and ours over three mixtures of lengths.

A model, not a measurement: rates are stated (CostModel), compute follows the visible pairs, transfers their bytes. It takes for granted:

* plain ring: every document in as many pieces as there are ranks, padded to that; all keys pass all ranks, in lockstep, each hop at the
  rate of the slowest link of the ring; rank r computes on the pieces before its own
* zigzag: the same with two pieces a rank, so that every rank has equal work at every hop
* all-gather: the packed row in two pieces a rank; keys are gathered first (over the network once a node), then all is computed; in the
  backward they are gathered again and float32 gradients are scattered back
* Ulysses: mode "all_to_all" of `ring_attention`, where the ranks divide the KV heads
* ours: mode "ring" of `ring_attention`, bytes and steps from its plan
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from longvita_kernels import plan_context_parallel
from longvita_kernels.ring import all_to_all, layouts
from longvita_kernels.ring.cost import CostModel

TOKENS = 1 << 20
RANKS = (8, 16, 32, 64, 128, 256, 512)
PER_NODE = 8
SHAPE = {"heads": 40, "kv_heads": 8, "head_dim": 128}  # Long-VITA 14B
DTYPE = torch.bfloat16
SCHEMES = ("plain ring", "zigzag", "all-gather", "Ulysses", "ours")


def mixture(tokens: int, seed: int = 0) -> list[int]:
    """Long-tailed lengths: half texts, three in ten images of up to 13 tiles, one in five videos of 8 to 1,024 frames of 256 tokens."""
    generator, lengths = np.random.default_rng(seed), []
    while sum(lengths) < tokens:
        kind, text = generator.random(), int(generator.lognormal(np.log(400), 1.0)) + 1
        if kind < 0.5:
            lengths.append(text)
        elif kind < 0.8:
            lengths.append(text + 256 * int(generator.integers(1, 14)))
        else:
            lengths.append(text + 256 * int(np.exp(generator.uniform(np.log(8), np.log(1024)))))
    lengths[-1] -= sum(lengths) - tokens
    return lengths


def mixtures(tokens: int = TOKENS) -> dict[str, list[int]]:
    """The three mixtures of lengths, each of `tokens` tokens (a multiple of 4,096)."""
    return {"uniform 4K": [4096] * (tokens // 4096), "one document": [tokens], "video and text": mixture(tokens)}


@dataclass(frozen=True)
class Outcome:
    """Seconds of forward + backward, those that are not hidden by compute, largest attention area over the mean, bytes that all ranks send
    together, share of the time that bare compute would take."""

    scheme: str
    seconds: float
    exposed: float
    imbalance: float
    bytes: int
    efficiency: float


def simulate(lengths: list[int], ranks: int, cost: CostModel, per_node: int | None = None, dtype=DTYPE, shape=SHAPE) -> list[Outcome]:
    """Forward + backward of one layer's attention, by scheme; Ulysses is left out where the ranks do not divide the heads."""
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    per_node = min(per_node or ranks, ranks)
    plan = plan_context_parallel(offsets, ranks, ranks_per_node=per_node)
    machine = _Machine(cost, ranks, per_node, dtype, **shape)
    ideal = 7 * machine.pair_seconds * float(plan.areas.sum()) / ranks
    outcomes = [
        machine.ring("plain ring", lengths, 1, ideal),
        machine.ring("zigzag", lengths, 2, ideal),
        machine.all_gather(plan, ideal),
    ]
    sizes = plan, shape["heads"], shape["kv_heads"], shape["head_dim"], dtype
    both = (False, True)
    if all_to_all.divides(*sizes[:3]):
        parts = [cost.all_to_all(*sizes, backward=b) for b in both]
        sent = sum(all_to_all.bytes_sent(plan, rank, *sizes[1:], backward=b) for rank in range(ranks) for b in both)
        outcomes.append(_outcome("Ulysses", sum(p.seconds for p in parts), sum(p.exposed for p in parts), 1.0, sent, ideal))
    parts = [cost.ring(*sizes, backward=b) for b in both]
    sent = sum(plan.bytes_sent(rank, *sizes[2:], backward=b) for rank in range(ranks) for b in both)
    outcomes.append(_outcome("ours", sum(p.seconds for p in parts), sum(p.exposed for p in parts), plan.imbalance, sent, ideal))
    return outcomes


def _outcome(scheme, seconds, exposed, imbalance, sent, ideal):
    return Outcome(scheme, seconds, max(exposed, 0.0), float(imbalance), int(sent), min(1.0, ideal / seconds) if seconds else 1.0)


class _Machine:
    def __init__(self, cost, ranks, per_node, dtype, heads, kv_heads, head_dim):
        self.cost, self.ranks, self.per_node = cost, ranks, per_node
        self.pair_seconds = 2 * heads * head_dim / cost.flops  # of one product of a visible pair; forward has 2, backward 5
        self.key_bytes = 2 * kv_heads * head_dim * dtype.itemsize
        self.gradient_bytes = 2 * kv_heads * head_dim * torch.promote_types(dtype, torch.float32).itemsize
        self.slowest = cost.network_bandwidth if ranks > per_node else cost.node_bandwidth

    def ring(self, scheme, lengths, pieces, ideal):
        """Documents in `pieces` · ranks pieces; keys go round (but not home), in the backward with their float32 gradients (home too)."""
        piece = -(-np.array(lengths) // (pieces * self.ranks))  # tokens of one piece of each document
        own = int(pieces * piece.sum())
        square = float((piece.astype(float) ** 2).sum())
        # step 0 is the own triangle; a plain ring then waits for whoever computes a whole square, zigzag has two in every hop
        first, hop = square * pieces**2 / 2, square * (1 if pieces == 1 else 2)
        compute = (first + hop * (self.ranks - 1)) * 7 * self.pair_seconds
        seconds = 0.0  # (the gradients' last hop, home, is hidden by nothing)
        for products, size in ((2, self.key_bytes), (5, self.key_bytes + self.gradient_bytes)):
            step, transfer = products * self.pair_seconds * np.array([first, hop]), own * size / self.slowest + self.cost.latency
            hidden = [step[0], *[step[1]] * (self.ranks - 2)] if self.ranks > 1 else []
            seconds += sum(max(s, transfer) for s in hidden) + step[1 if self.ranks > 1 else 0]
        seconds += own * self.gradient_bytes / self.slowest if self.ranks > 1 else 0.0
        if pieces == 1:  # rank r computes on r whole squares and its own half
            work = square * (np.arange(self.ranks) + 0.5)
            imbalance = work.max() / work.mean()
        else:
            imbalance = 1.0
        sent = self.ranks * own * (2 * (self.ranks - 1) * self.key_bytes + self.ranks * self.gradient_bytes)
        return _outcome(scheme, seconds, seconds - compute, imbalance, sent, ideal)

    def all_gather(self, plan, ideal):
        """Two pieces of the packed row a rank, as in Llama 3."""
        tokens, documents = plan.total_tokens, plan.documents
        pieces = layouts.contiguous(documents, 2 * self.ranks)
        area = [sum(int((documents.area_before(p[:, 1]) - documents.area_before(p[:, 0])).sum()) for p in pair)
                for pair in zip(pieces[: self.ranks], pieces[: self.ranks - 1 : -1], strict=True)]  # fmt: skip
        share, nodes = tokens / self.ranks, self.ranks // self.per_node
        rate = max(share * (nodes - 1) / self.cost.network_bandwidth, share * nodes * (self.per_node - 1) / self.cost.node_bandwidth)
        exposed = rate * (2 * self.key_bytes + self.gradient_bytes) + 3 * self.cost.latency
        seconds = 7 * self.pair_seconds * max(area) + exposed
        sent = tokens * (self.ranks - 1) * (2 * self.key_bytes + self.gradient_bytes)
        return _outcome("all-gather", seconds, exposed, max(area) / np.mean(area), sent, ideal)


def report(cost: CostModel | None = None, ranks=RANKS, tokens: int = TOKENS) -> dict:
    """All mixtures on all numbers of ranks, as kept in bench/results/ring-simulation.json."""
    cost = CostModel() if cost is None else cost
    rows = [
        {"lengths": name, "documents": len(lengths), "ranks": n, **asdict(outcome)}
        for name, lengths in mixtures(tokens).items()
        for n in ranks
        for outcome in simulate(lengths, n, cost, PER_NODE)
    ]
    hardware = {**asdict(cost), "ranks_per_node": PER_NODE}
    return {"tokens": tokens, "hardware": hardware, "shape": {**SHAPE, "dtype": str(DTYPE).removeprefix("torch.")}, "results": rows}


def table(found: dict) -> str:
    """The results as text: one line a scheme."""
    hardware, shape = found["hardware"], found["shape"]
    lines = [
        f"{found['tokens']:,} tokens, {shape['heads']}/{shape['kv_heads']} heads of {shape['head_dim']}, forward + backward of one layer",
        f"a rank: {hardware['flops'] / 1e12:.0f} TFLOP/s, {hardware['node_bandwidth'] / 1e9:.0f} GB/s in its node of "
        f"{hardware['ranks_per_node']}, {hardware['network_bandwidth'] / 1e9:.0f} GB/s between nodes, {hardware['latency'] * 1e6:.0f} µs",
        "lengths          ranks  scheme            time    exposed imbalance    GB sent efficiency",
    ]
    for row in found["results"]:
        lines.append(
            f"{row['lengths']:16s} {row['ranks']:5d}  {row['scheme']:11s} {row['seconds'] * 1e3:7.2f} ms {row['exposed'] * 1e3:7.2f} ms "
            f"{row['imbalance']:9.3f} {row['bytes'] / 1e9:10.3f} {row['efficiency']:10.3f}"
        )
    return "\n".join(lines)


def plot(path: Path, found: dict) -> None:
    """Efficiency and bytes over the number of ranks, one column a mixture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["lengths"] for row in found["results"]))
    figure, axes = plt.subplots(2, len(names), figsize=(4.2 * len(names), 6.4), sharex=True, sharey="row", squeeze=False)
    for column, name in enumerate(names):
        for scheme, colour in zip(SCHEMES, plt.get_cmap("tab10").colors, strict=False):
            rows = [row for row in found["results"] if row["lengths"] == name and row["scheme"] == scheme]
            ranks, style = [row["ranks"] for row in rows], {"marker": "o", "markersize": 4, "color": colour, "label": scheme}
            axes[0][column].plot(ranks, [row["efficiency"] for row in rows], **style)
            axes[1][column].plot(ranks, [max(row["bytes"], 1e6) / 1e9 for row in rows], **style)
        axes[0][column].set_title(name)
        axes[0][column].set_ylim(0, 1.05)
        axes[1][column].set_yscale("log")
        axes[1][column].set_xscale("log", base=2)
        axes[1][column].set_xticks(sorted({row["ranks"] for row in found["results"]}))
        axes[1][column].get_xaxis().set_major_formatter(matplotlib.ticker.ScalarFormatter())
        axes[1][column].set_xlabel("ranks")
        for row in axes:
            row[column].grid(alpha=0.3)
    axes[0][0].set_ylabel("efficiency: bare compute / time")
    axes[1][0].set_ylabel("GB sent (lowest: none)")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"{found['tokens']:,} tokens, simulated, forward + backward of one layer", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
