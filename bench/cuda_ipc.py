"""Processes that share one GPU, where NCCL refuses them: tensors change hands through CUDA IPC, gloo only passes the handles.

A group for `ring_attention` (longvita_kernels/ring/transport.py says what that is). The sender publishes a handle once its work on the
tensor is done; the receiver copies from the sender's memory and says so; until then the sender keeps the tensor.
"""

from __future__ import annotations

import base64
import pickle
from collections import defaultdict

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import reduce_tensor


class CudaIpc:
    """All processes of the default (gloo) group, on one GPU."""

    name, eager = "cuda-ipc", True

    def __init__(self):
        self.group, self.rank, self.size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
        self.store = dist.distributed_c10d._get_default_store()
        self._numbers = defaultdict(int)

    def exchange(self, step, sends, receives, tag=0):
        """See longvita_kernels.ring.transport.ProcessGroup.exchange."""
        torch.cuda.current_stream().synchronize()  # what is sent has been computed
        going = []
        for peer, tensor in sends:
            key = self._key(self.rank, peer, tag)
            rebuild, arguments = reduce_tensor(tensor.contiguous())
            self.store.set(key, base64.b64encode(pickle.dumps((rebuild, arguments))))
            going.append((key, peer, tensor))
        return _Copies(self, step, going, [(self._key(peer, self.rank, tag), peer, tensor) for peer, tensor in receives])

    def _key(self, source, target, tag):
        self._numbers[source, target, tag] += 1
        return f"{source}>{target}/{tag}/{self._numbers[source, target, tag]}"


class _Copies:
    def __init__(self, group, step, going, coming):
        self._group, self._step, self._going, self._coming = group, step, going, coming

    def wait(self):
        for key, peer, tensor in self._coming:
            # torch describes a tensor's memory for another process only so; it comes from a process that this benchmark started itself
            rebuild, arguments = pickle.loads(base64.b64decode(self._get(key, f"receiving from rank {peer}")))
            tensor.copy_(rebuild(*arguments))
            torch.cuda.current_stream().synchronize()  # the sender may change its tensor from here on
            self._group.store.set(f"{key}/done", "")
        self._coming = []

    def finish(self):
        self.wait()
        for key, peer, _ in self._going:
            self._get(f"{key}/done", f"sending to rank {peer}")
        self._going = []

    def _get(self, key, what):
        try:
            return self._group.store.get(key)
        except RuntimeError as error:
            raise RuntimeError(f"rank {self._group.rank}, {self._step}: {what} failed: {error}") from error
