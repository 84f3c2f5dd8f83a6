"""Tensors between the ranks of a group, point to point, under way while something else is computed.

`of(group)` gives what the ring needs of a torch.distributed group (gloo on CPUs, NCCL on GPUs): `rank`, `size`, `name`, `eager` and
`exchange`. An object that has these itself is taken as it is: `PeerCopies` (peer_copies.py) for processes of one machine that share GPUs or
reach each other's memory; tests run many ranks in one process that way.
"""

import time

import torch
import torch.distributed as dist

_PATIENCE = 0.9  # of the group's time-out: NCCL's own watchdog, which knows neither peer nor step, ends the process at 1
_NAP = 20e-6  # seconds between two looks at a transfer: what a step may lose that waits for its keys


def of(group, device):
    """The transport of a process group for tensors on such a device; of the default group for None."""
    return group if hasattr(group, "exchange") else ProcessGroup(group, device)


class ProcessGroup:
    """A torch.distributed group. It may have one backend for each kind of device; `device` says whose tensors are meant."""

    def __init__(self, group=None, device="cpu"):
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError("there is no process group; call torch.distributed.init_process_group first, and run one process a rank")
        self.group = dist.group.WORLD if group is None else group
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError("this process is no member of the group that it was given; only its members take part")

        backend = _backend(self.group, device)
        # NCCL runs what it is given one after the other: a send that is received much later would hold up everything behind it
        self.eager = backend.name() == "gloo"
        self._time_out = None if self.eager else _time_out(backend)

    @property
    def name(self):
        return self.group.group_name

    def exchange(self, step, sends, receives, tag=0):
        """Start all transfers and return at once. sends, receives: [(peer, dense tensor)].

        `step` is what an error calls it; `tag` tells apart what two ranks have under way at a time. Where the group is not `eager`, both
        sides must call it in the same order. The tensors must stay as they are until `finish`.
        """
        operations = [dist.P2POp(dist.irecv, tensor, group=self.group, group_peer=peer, tag=tag) for peer, tensor in receives]
        operations += [dist.P2POp(dist.isend, tensor, group=self.group, group_peer=peer, tag=tag) for peer, tensor in sends]
        what = [f"receiving from rank {peer}" for peer, _ in receives] + [f"sending to rank {peer}" for peer, _ in sends]
        if not operations:
            return Transfers(self, step, [], [])
        try:
            works = dist.batch_isend_irecv(operations)
        except RuntimeError as error:
            raise RuntimeError(f"{self.failed(step, ', '.join(what))}: {error}") from error
        if len(works) != len(what):  # NCCL gives one for all
            return Transfers(self, step, [(work, ", ".join(what)) for work in works], [])
        pairs = list(zip(works, what, strict=True))
        return Transfers(self, step, pairs[: len(receives)], pairs[len(receives) :])

    def deadline(self):
        """When a transfer that begins now has taken too long, on `time.monotonic`; None: it says so itself."""
        return None if self._time_out is None else time.monotonic() + _PATIENCE * self._time_out

    def failed(self, step, what):
        return f"rank {self.rank} of {self.size}, {step}: {what} failed; a peer has died, hangs, or called something else"


def _backend(group, device):
    """What carries a group's tensors on such a device. `dist.get_backend` names one for all devices, "undefined" where nobody named any."""
    try:
        return group._get_backend(torch.device(device))
    except RuntimeError as error:
        raise ValueError(
            f"the group has no backend for tensors on {device}; give it one when it is made (backend='cpu:gloo,cuda:nccl') or move them"
        ) from error


def _time_out(backend):
    """Seconds that it gives an operation."""
    return backend.options._timeout.total_seconds()


class Transfers:
    """What `exchange` began: [(work, what an error calls it)].

    gloo's wait raises by itself. NCCL's only makes the stream wait: a dead peer would show as a hang, until the watchdog ends the process
    with a message about a numbered operation. So there the host waits as well, until what it needs has come or the deadline has passed.
    It has launched the step before by then, so the GPU is busy; a captured graph, in which nothing runs yet, is left alone.
    """

    def __init__(self, group, step, receives, sends):
        self._group, self._step, self._receives, self._sends = group, step, receives, sends
        self._deadline = group.deadline()

    def wait(self):
        """Until everything has arrived. RuntimeError, naming peer and step, when a peer is gone or the group's time-out is over."""
        self._receives = self._finish(self._receives)

    def finish(self):
        """Until everything has left: the tensors that were sent may change again."""
        self.wait()
        self._sends = self._finish(self._sends)

    def _finish(self, works):
        for work, what in works:
            try:
                if self._deadline is not None and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
                    self._watch(work)
                work.wait()
            except RuntimeError as error:
                raise RuntimeError(f"{self._group.failed(self._step, what)}: {error}") from error
        return []

    def _watch(self, work):
        """Until a work is complete, with success or not, or too late."""
        while not work.is_completed():
            if time.monotonic() > self._deadline:
                raise RuntimeError(f"nothing has come through within {_PATIENCE:.0%} of the group's time-out")
            time.sleep(_NAP)
        if (error := work.exception()) is not None:
            raise RuntimeError(str(error))
