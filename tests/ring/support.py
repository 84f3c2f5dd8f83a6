"""Many ranks in one process: a thread each, and a group that hands tensors from thread to thread."""

import queue
import threading

import torch

from longvita_kernels import varlen_attention
from longvita_kernels.ring.attention import AGREEING

SECONDS = 300  # for a message, so that a test that hangs ends


class Threads:
    """What the ring needs of a group, for `size` threads; `sent[rank]` counts bytes, without those that compare arguments."""

    def __init__(self, size, eager=True):
        self.size, self.eager, self.sent = size, eager, [0] * size
        self._queues, self._lock = {}, threading.Lock()

    def queue(self, *key):
        """The messages of this key. Sender and receiver may ask first at the same moment."""
        with self._lock:
            return self._queues.setdefault(key, queue.Queue())

    def run(self, function):
        """[function(member)] of all ranks; the first exception of any of them."""
        results, errors = [None] * self.size, []

        def work(rank):
            try:
                results[rank] = function(Member(self, rank))
            except Exception as error:  # handed to the test, below
                errors.append(error)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise next((e for e in errors if not isinstance(e, queue.Empty)), errors[0])
        return results


class Member:
    """One rank of `Threads`."""

    def __init__(self, threads, rank):
        self.threads, self.rank, self.size, self.name, self.eager = threads, rank, threads.size, "threads", threads.eager

    def exchange(self, step, sends, receives, tag=0):
        for peer, tensor in sends:
            self.threads.sent[self.rank] += 0 if step == AGREEING else tensor.numel() * tensor.element_size()
            self.threads.queue(self.rank, peer, tag).put(tensor.clone())
        return Arrivals([(self.threads.queue(peer, self.rank, tag), tensor) for peer, tensor in receives])


class Arrivals:
    def __init__(self, receives):
        self._receives = receives

    def wait(self):
        for waiting, tensor in self._receives:
            arrived = waiting.get(timeout=SECONDS)
            assert arrived.shape == tensor.shape and arrived.dtype == tensor.dtype
            tensor.copy_(arrived)
        self._receives = []

    finish = wait


def tensors(tokens, heads, dim, dtype=torch.float32, seed=0):
    """q, k, v, the gradient of out and that of lse."""
    generator = torch.Generator().manual_seed(seed)
    q, g = (torch.randn(tokens, heads[0], dim, generator=generator).to(dtype) for _ in range(2))
    k, v = (torch.randn(tokens, heads[1], dim, generator=generator).to(dtype) for _ in range(2))
    return q, k, v, g, torch.randn(heads[0], tokens, generator=generator)


def with_gradients(function, inputs, grads):
    """(out, lse, dq, dk, dv) of function(q, k, v) → (out, lse)."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, lse = function(*leaves)
    return out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, grads)


def on_one(plan, inputs, causal=True, window_size=(-1, -1)):
    """The same on one rank: what the ring must give, all tokens."""
    q, k, v, g, g_lse = inputs
    cu = torch.from_numpy(plan.documents.offsets).to(torch.int32)

    def attention(q, k, v):
        return varlen_attention(q, k, v, cu, causal=causal, window_size=window_size, return_lse=True)

    return with_gradients(attention, (q, k, v), (g, g_lse))


def shards(plan, inputs, rank):
    """The rank's q, k, v and gradients."""
    return [plan.shard(x, rank) for x in inputs[:4]] + [plan.shard(inputs[4], rank, dim=1)]


def gathered(plan, results):
    """Results of all ranks, (out, lse, dq, dk, dv) each, in the order of the packed row."""
    names = ("out", "lse", "dq", "dk", "dv")
    whole = {}
    for i, name in enumerate(names):
        dim = 1 if name == "lse" else 0
        shape = list(results[0][i].shape)
        shape[dim] = plan.total_tokens
        whole[name] = results[0][i].new_full(shape, float("nan"))
        for rank, result in enumerate(results):
            at = 0
            for a, b in plan.slices[rank].tolist():
                whole[name].narrow(dim, a, b - a).copy_(result[i].narrow(dim, at, b - a))
                at += b - a
            assert at == result[i].shape[dim]
    return whole
