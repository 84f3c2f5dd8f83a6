"""How long a call takes by a simple model of the machine: to choose between ring and all-to-all, and to simulate other machines."""

from dataclasses import dataclass

import numpy as np
import torch

from longvita_kernels.ring import all_to_all


@dataclass(frozen=True)
class Estimate:
    """Seconds of the slowest rank, and of one rank's share of the bare computation; what is not computation; the rank's most bytes sent."""

    seconds: float
    ideal: float
    exposed: float
    bytes: int

    @property
    def efficiency(self):
        return self.ideal / self.seconds if self.seconds else 1.0


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Rates of the machine. The defaults are those of eight H100 a node: attention at half of its peak, NVLink, one 400 Gbit/s port a rank.

    flops              FLOP/s of attention on one rank
    node_bandwidth     bytes/s that one rank sends, and at the same time receives, inside its node
    network_bandwidth  the same to and from other nodes
    latency            seconds before the first byte of a transfer, and to start a step
    """

    flops: float = 400e12
    node_bandwidth: float = 200e9
    network_bandwidth: float = 40e9
    latency: float = 15e-6

    def __post_init__(self):
        for name in ("flops", "node_bandwidth", "network_bandwidth"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a rate above 0")
        if not self.latency >= 0:
            raise ValueError(f"latency is {self.latency}; expected seconds, at least 0")

    def choose(self, plan, heads, kv_heads, head_dim, dtype):
        """The faster mode of `ring_attention`, forward and backward together: "ring" or "all_to_all". The plan remembers the answer."""
        if plan.world_size == 1 or not all_to_all.divides(plan, heads, kv_heads):
            return "ring"
        shape = heads, kv_heads, head_dim, dtype
        if (self, shape) not in plan.choices:
            ring, swap = (
                sum(estimate(plan, *shape, backward=b).seconds for b in (False, True)) for estimate in (self.ring, self.all_to_all)
            )
            plan.choices[self, shape] = "ring" if ring <= swap else "all_to_all"
        return plan.choices[self, shape]

    def ring(self, plan, heads, kv_heads, head_dim, dtype, *, backward=False):
        """Estimate of mode "ring"."""
        each = 2 * kv_heads * head_dim
        work = self.work(plan.areas, heads, head_dim, backward)
        computing = self.work(_areas_by_step(plan), heads, head_dim, backward)
        travelling = self._travelling(plan, each * dtype.itemsize)
        if backward:  # the gradients of what arrived go back while the next steps compute
            returning = self._travelling(plan, each * torch.promote_types(dtype, torch.float32).itemsize, returned=True)
            travelling = np.pad(travelling, ((0, 0), (0, returning.shape[1] - travelling.shape[1]))) + returning
        computing = np.pad(computing, ((0, 0), (0, travelling.shape[1] - computing.shape[1])))
        seconds = float(np.maximum(computing, travelling).sum(axis=1).max())
        sent = max(plan.bytes_sent(rank, kv_heads, head_dim, dtype, backward=backward) for rank in range(plan.world_size))
        return Estimate(seconds, float(work.mean()), seconds - float(work.max()), sent)

    def all_to_all(self, plan, heads, kv_heads, head_dim, dtype, *, backward=False):
        """Estimate of mode "all_to_all"; nothing of its two exchanges is hidden."""
        ranks = plan.world_size
        far = ranks - plan.ranks_per_node
        rate = (ranks - 1) / (far / self.network_bandwidth + (ranks - 1 - far) / self.node_bandwidth) if ranks > 1 else self.node_bandwidth
        sent = max(all_to_all.bytes_sent(plan, rank, heads, kv_heads, head_dim, dtype, backward=backward) for rank in range(ranks))
        exposed = sent / rate + 2 * self.latency
        ideal = float(self.work(plan.areas, heads, head_dim, backward).mean())
        return Estimate(ideal + exposed, ideal, exposed, sent)

    def work(self, areas, heads, head_dim, backward):
        """Seconds of computation: two products forward, five backward."""
        return areas * ((10 if backward else 4) * heads * head_dim / self.flops)

    def _travelling(self, plan, bytes_per_token, returned=False):
        """(ranks, ticks): seconds of transfers, a step's spread evenly over the ticks between its departure and its use."""
        routes, ranks = plan.routes, plan.world_size
        seconds = np.zeros((ranks, (max(routes.returned_at) if returned else routes.steps) + 1))
        if not len(routes.step):
            return seconds
        rate = np.where(
            routes.source // plan.ranks_per_node == routes.target // plan.ranks_per_node, self.node_bandwidth, self.network_bandwidth
        )
        row_seconds = (routes.stop - routes.start) * bytes_per_token / rate
        size = ranks * (routes.steps + 1)
        each = np.maximum(
            *(np.bincount(end * (routes.steps + 1) + routes.step, row_seconds, size) for end in (routes.source, routes.target))
        )
        each = each.reshape(ranks, -1)
        each += self.latency * (each > 0)
        for step in range(1, routes.steps + 1):
            first, stop = (routes.returned_at[step], routes.returned_at[step] + 1) if returned else (routes.sent_at[step], step)
            seconds[:, first:stop] += each[:, step, None] / (stop - first)
        return seconds


def _areas_by_step(plan):
    """(ranks, steps + 1): visible pairs computed in each step. With own keys exactly (without a window), the rest by tokens that arrive."""
    routes, ranks = plan.routes, plan.world_size
    own = np.array([_own_area(plan.documents, part) for part in plan.slices], dtype=np.float64)
    arriving = np.bincount(routes.target * (routes.steps + 1) + routes.step, routes.stop - routes.start, ranks * (routes.steps + 1))
    arriving = arriving.reshape(ranks, -1)
    share = arriving / np.maximum(arriving.sum(axis=1, keepdims=True), 1)
    areas = np.maximum(plan.areas - own, 0)[:, None] * share
    areas[:, 0] = np.where(arriving.any(axis=1), own, plan.areas)
    return areas


def _own_area(documents, slices):
    if not len(slices):
        return 0
    first, last = documents.at(slices[:, 0]), documents.at(slices[:, 1] - 1)
    two = last > first
    # pieces of documents that are cut, or may be; the whole ones between them
    begin = np.concatenate((slices[:, 0], documents.offsets[last[two]]))
    document = np.concatenate((first, last[two]))
    end = np.minimum(np.concatenate((slices[:, 1], slices[two, 1])), documents.offsets[document + 1])
    whole = documents.area_before(documents.offsets[last[two]]) - documents.area_before(documents.offsets[first[two] + 1])
    lengths = end - begin
    if documents.left < 0 and documents.right <= 0:  # pieces of one document see each other as one piece would
        lengths = np.bincount(np.unique(document, return_inverse=True)[1], lengths).astype(np.int64)
    return int(whole.sum()) + int(documents.area_of_head(lengths, lengths).sum())
