"""Tensors between processes of one machine, GPU to GPU or within one GPU that they share: the receiver copies from the sender's memory.

A transport for `ring_attention`, on request: `ring_attention(…, group=PeerCopies(gloo_group))`. For each tensor the sender publishes its
memory and two events of its own, `ready` and `done`, in a message over gloo; the receiver's side stream waits for `ready`, copies and
records `done`, and a message goes back. No process waits for a GPU: `wait` and `finish` wait for messages, and make torch's stream wait for
events. Each transfer has its own events: a process may wait for another's event only once told that it was recorded, and one that is
recorded again too early could let two streams wait for each other.
"""

import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from longvita_kernels.cuda import native_cuda
from longvita_kernels.ring.transport import ProcessGroup

_MESSAGE = struct.Struct("64s64s64sqq")  # memory, ready, done: handles; where in the memory; how many bytes
_ANSWERS = 1 << 20  # added to the tag of a message for the answer to it
_COPIED, _FAILED = 1, 2
_THREADS = 64  # more than exchanges are ever under way: each waits in a thread for what it is to copy


class _Events(NamedTuple):
    ready: int
    done: int
    handles: tuple[bytes, bytes]


class PeerCopies:
    """Processes on one machine, each with its tensors on one GPU; several may share a GPU.

    group  a gloo group of torch.distributed, which carries the messages; None: the default group

    Memory that was sent must not go back to the driver (torch.cuda.empty_cache, expandable segments) before every rank has called `close`.
    RuntimeError where the CUDA kernels were not built; ValueError for a group that is not gloo.
    """

    eager = True  # a send that is received late holds nobody up

    def __init__(self, group=None):
        if native_cuda.load() is None:
            raise RuntimeError(native_cuda.why_missing())
        self._messages = ProcessGroup(group)
        if not self._messages.eager:
            raise ValueError("the messages of peer copies travel over gloo; give a group of torch.distributed.new_group(backend='gloo')")
        self.rank, self.size, self.name = self._messages.rank, self._messages.size, f"peer copies, {self._messages.name}"
        self._kernels, self._threads = native_cuda.load(), ThreadPoolExecutor(_THREADS, "peer-copies")
        self._device, self._side_stream, self._opening = None, None, threading.Lock()
        self._spare, self._made, self._memory, self._events = [], [], {}, {}  # events: to use again, all; opened: memory, events, by handle

    def exchange(self, step, sends, receives, tag=0):
        """See longvita_kernels.ring.transport.ProcessGroup.exchange."""
        self._use_device_of([tensor for _, tensor in (*sends, *receives)])
        going = [(peer, tensor, self._take_events()) for peer, tensor in sends]
        messages = [(peer, self._announce(tensor, events)) for peer, tensor, events in going]
        empty = [(peer, torch.empty(_MESSAGE.size, dtype=torch.uint8)) for peer, _ in receives]
        answers = [(peer, torch.empty(1, dtype=torch.uint8)) for peer, _ in sends]
        told = self._messages.exchange(step, messages, empty, tag)
        answered = self._messages.exchange(step, [], answers, tag + _ANSWERS)
        coming = None
        if receives:
            events = self._take_events()  # `ready`: the receiving tensors may be written; `done`: they have been
            self._kernels.event_record(events.ready, native_cuda.stream(self._device))
            coming = events, self._threads.submit(self._receive, step, receives, empty, told, events, tag + _ANSWERS)
        return _Copies(self, step, going, told, answers, answered, coming)

    def close(self):
        """Give back what was opened of other processes. Nothing may be under way."""
        self._threads.shutdown()
        if self._device is None:
            return
        with native_cuda.current(self._device):
            for start in self._memory.values():
                self._kernels.memory_close(start)
            for event in (*self._events.values(), *(event for made in self._made for event in made[:2])):
                self._kernels.event_destroy(event)
            self._kernels.stream_destroy(self._side_stream)
        self._device = None

    def _use_device_of(self, tensors):
        devices = {tensor.device for tensor in tensors} | ({self._device} if self._device else set())
        if len(devices) > 1:
            raise ValueError(f"a rank of peer copies has its tensors on one device, got {', '.join(sorted(map(str, devices)))}")
        if self._device is None and devices:
            (self._device,) = devices
            with native_cuda.current(self._device):
                self._side_stream = self._kernels.stream_create()

    def _take_events(self):
        if self._spare:
            return self._spare.pop()
        with native_cuda.current(self._device):
            ready, done = (self._kernels.event_create() for _ in range(2))
            self._made.append(_Events(ready, done, (self._kernels.event_export(ready), self._kernels.event_export(done))))
        return self._made[-1]

    def _announce(self, tensor, events):
        """The message that lets another process copy a tensor, once what torch's stream has to do so far is done."""
        if not tensor.is_contiguous():
            raise ValueError("peer copies send dense tensors; call contiguous()")
        with native_cuda.current(self._device):
            self._kernels.event_record(events.ready, native_cuda.stream(self._device))
            memory, offset = self._kernels.memory_export(tensor.data_ptr()) if tensor.numel() else (b"", 0)
        packed = _MESSAGE.pack(memory, *events.handles, offset, tensor.numel() * tensor.element_size())
        return torch.frombuffer(bytearray(packed), dtype=torch.uint8)

    def _receive(self, step, receives, messages, told, events, tag):
        """In a thread: copy what the messages name as soon as they are there, and answer. Returns the answers under way."""
        told.wait()
        result = _COPIED
        try:
            with native_cuda.current(self._device):
                self._kernels.event_wait(events.ready, self._side_stream)
                for (peer, tensor), (_, message) in zip(receives, messages, strict=True):
                    self._copy(step, peer, tensor, *_MESSAGE.unpack(message.numpy().tobytes()))
                self._kernels.event_record(events.done, self._side_stream)
        except BaseException:
            result = _FAILED
            raise
        finally:
            answers = [(peer, torch.tensor([result], dtype=torch.uint8)) for peer, _ in receives]
            answering = self._messages.exchange(step, answers, [], tag)
        return answering

    def _copy(self, step, peer, tensor, memory, ready, done, offset, size):
        if size != tensor.numel() * tensor.element_size():
            wanted, what = tensor.numel() * tensor.element_size(), f"receiving from rank {peer}"
            raise RuntimeError(f"{self._messages.failed(step, what)}: it sends {size} bytes, expected were {wanted}")
        ready, done = (self._opened(self._events, event, self._kernels.event_open) for event in (ready, done))
        self._kernels.event_wait(ready, self._side_stream)
        if size:
            start = self._opened(self._memory, memory, self._kernels.memory_open)
            self._kernels.memory_copy(tensor.data_ptr(), start + offset, size, self._side_stream)
        self._kernels.event_record(done, self._side_stream)

    def _opened(self, known, handle, how):
        with self._opening:  # threads of several exchanges may meet here
            if handle not in known:
                known[handle] = how(handle)
            return known[handle]


class _Copies:
    """What `exchange` began."""

    def __init__(self, group, step, going, told, answers, answered, coming):
        self._group, self._step, self._going, self._told = group, step, going, told
        self._answers, self._answered, self._coming, self._answering = answers, answered, coming, None

    def wait(self):
        """torch's stream waits until everything has arrived. RuntimeError, naming peer and step, for what failed."""
        if self._coming is None:
            return
        events, copying = self._coming
        self._coming, self._answering = None, copying.result()
        self._group._kernels.event_wait(events.done, native_cuda.stream(self._group._device))
        self._group._spare.append(events)

    def finish(self):
        """The same until everything has left: the tensors that were sent may change again."""
        self.wait()
        if self._going is None:
            return
        self._told.finish()
        self._answered.wait()
        if self._answering is not None:
            self._answering.finish()
        for (peer, _, events), (_, answer) in zip(self._going, self._answers, strict=True):
            if int(answer) != _COPIED:
                raise RuntimeError(f"{self._group._messages.failed(self._step, f'sending to rank {peer}')}: it could not copy the tensor")
            self._group._kernels.event_wait(events.done, native_cuda.stream(self._group._device))
            self._group._spare.append(events)
        self._going = None
