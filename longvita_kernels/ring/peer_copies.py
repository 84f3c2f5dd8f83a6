"""Tensors between processes of one machine, GPU to GPU or within one GPU that they share: the receiver copies from the sender's memory.

A transport for `ring_attention`, on request: `ring_attention(…, group=PeerCopies(gloo_group))`. For each tensor the sender publishes its
memory and an event, recorded where the tensor has been computed, in a message over gloo; the receiver's side stream waits for that event,
copies, records an event of its own, and an answer with that one goes back. No process waits for a GPU: `wait` and `finish` wait for
messages, and make torch's stream wait for events.

A process records its own events only, and waits for another's only once told that it was recorded. One that was recorded again too early
could let two streams wait for each other: so an event is used again only when its process knows that nobody still has to wait for it. The
sender knows by the answer; the receiver is told with the next message, `released`.
"""

import struct
import threading
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor

import torch

from longvita_kernels.cuda import native_cuda
from longvita_kernels.ring.transport import ProcessGroup

_RELEASED = 4  # so many events a message can give back; each message costs one
_MESSAGE = struct.Struct(f"64s64sqq{_RELEASED}q")  # memory, event; where in the memory, how many bytes; released, −1 for none
_ANSWER = struct.Struct("qq64s")  # whether it was copied; number of the receiver's event, and the event
_ANSWERS = 1 << 20  # added to the tag of a message for the answer to it
_THREADS = 64  # more than exchanges are ever under way: each waits in a thread for what it is to copy


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
        self._kernels, self._threads, self._lock = native_cuda.load(), ThreadPoolExecutor(_THREADS, "peer-copies"), threading.Lock()
        self._device = self._side_stream = None
        self._made, self._spare = [], []  # own events with their handles; numbers of those that may be recorded
        self._memory, self._events = {}, {}  # what was opened of other processes, by handle
        self._released = defaultdict(deque)  # by rank: numbers of its events that were waited for, which it has not been told

    def exchange(self, step, sends, receives, tag=0):
        """See longvita_kernels.ring.transport.ProcessGroup.exchange."""
        self._use_device_of([tensor for _, tensor in (*sends, *receives)])
        going = [(peer, tensor, self._record_own(native_cuda.stream(self._device))) for peer, tensor in sends]
        messages = [(peer, self._announce(peer, tensor, number)) for peer, tensor, number in going]
        told = [(peer, torch.empty(_MESSAGE.size, dtype=torch.uint8)) for peer, _ in receives]
        answers = [(peer, torch.empty(_ANSWER.size, dtype=torch.uint8)) for peer, _ in sends]
        telling = self._messages.exchange(step, messages, told, tag)
        answered = self._messages.exchange(step, [], answers, tag + _ANSWERS)
        copying = None
        if receives:
            writable = self._record_own(native_cuda.stream(self._device))
            copying = self._threads.submit(self._receive, step, receives, told, telling, writable, tag + _ANSWERS)
        return _Copies(self, step, going, telling, answers, answered, copying)

    def close(self):
        """Give back what was opened of other processes. Nothing may be under way."""
        self._threads.shutdown()
        if self._device is None:
            return
        with native_cuda.current(self._device):
            for start in self._memory.values():
                self._kernels.memory_close(start)
            for event in (*self._events.values(), *(event for event, _ in self._made)):
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

    def _record_own(self, stream):
        """Number of an own event, recorded on a stream of this process."""
        with self._lock, native_cuda.current(self._device):
            if not self._spare:
                event = self._kernels.event_create()
                self._made.append((event, self._kernels.event_export(event)))
                self._spare.append(len(self._made) - 1)
            number = self._spare.pop()
            self._kernels.event_record(self._made[number][0], stream)
        return number

    # torch's default stream is number 0: the one of whichever device is current.
    def _wait_own(self, number, stream):
        with native_cuda.current(self._device):
            self._kernels.event_wait(self._made[number][0], stream)

    def _reuse(self, *numbers):
        with self._lock:
            self._spare.extend(numbers)

    def _opened(self, known, handle, how):
        with self._lock:
            if handle not in known:
                known[handle] = how(handle)
            return known[handle]

    def _wait_theirs(self, handle, stream):
        with native_cuda.current(self._device):
            self._kernels.event_wait(self._opened(self._events, handle, self._kernels.event_open), stream)

    def _announce(self, peer, tensor, number):
        """The message that lets another process copy a tensor once the event of this number has come."""
        if not tensor.is_contiguous():
            raise ValueError("peer copies send dense tensors; call contiguous()")
        with native_cuda.current(self._device):
            memory, offset = self._kernels.memory_export(tensor.data_ptr()) if tensor.numel() else (b"", 0)
        released = [self._released[peer].popleft() if self._released[peer] else -1 for _ in range(_RELEASED)]
        return _packed(_MESSAGE, memory, self._made[number][1], offset, tensor.numel() * tensor.element_size(), *released)

    def _receive(self, step, receives, messages, telling, writable, tag):
        """In a thread: copy what the messages name as soon as they are there, and answer. → number of the event that tells when all has
        been copied, the answers under way."""
        telling.wait()
        answers, done = [], None
        try:
            with native_cuda.current(self._device):
                self._wait_own(writable, self._side_stream)
                self._reuse(writable)
                for (peer, tensor), (_, message) in zip(receives, messages, strict=True):
                    self._copy(step, peer, tensor, *_MESSAGE.unpack(message.numpy().tobytes()))
                    number = self._record_own(self._side_stream)
                    answers.append((peer, _packed(_ANSWER, True, number, self._made[number][1])))
                done = self._record_own(self._side_stream)
        finally:
            answers += [(peer, _packed(_ANSWER, False, -1, b"")) for peer, _ in receives[len(answers) :]]
            answering = self._messages.exchange(step, answers, [], tag)
        return done, answering

    def _copy(self, step, peer, tensor, memory, ready, offset, size, *released):
        self._reuse(*(number for number in released if number >= 0))
        if size != tensor.numel() * tensor.element_size():
            wanted, what = tensor.numel() * tensor.element_size(), f"receiving from rank {peer}"
            raise RuntimeError(f"{self._messages.failed(step, what)}: it sends {size} bytes, expected were {wanted}")
        self._wait_theirs(ready, self._side_stream)
        if size:
            start = self._opened(self._memory, memory, self._kernels.memory_open)
            self._kernels.memory_copy(tensor.data_ptr(), start + offset, size, self._side_stream)


def _packed(form, *values):
    return torch.frombuffer(bytearray(form.pack(*values)), dtype=torch.uint8)


class _Copies:
    """What `exchange` began."""

    def __init__(self, group, step, going, telling, answers, answered, copying):
        self._group, self._step, self._going, self._telling = group, step, going, telling
        self._answers, self._answered, self._copying, self._answering = answers, answered, copying, None

    def wait(self):
        """torch's stream waits until everything has arrived. RuntimeError, naming peer and step, for what failed."""
        if self._copying is None:
            return
        copying, self._copying = self._copying, None
        done, self._answering = copying.result()
        self._group._wait_own(done, native_cuda.stream(self._group._device))
        self._group._reuse(done)

    def finish(self):
        """The same until everything has left: the tensors that were sent may change again."""
        self.wait()
        going, self._going = self._going, []
        self._telling.finish()
        self._answered.wait()
        if self._answering is not None:
            self._answering.finish()
        for (peer, _, ready), (_, answer) in zip(going, self._answers, strict=bool(going)):
            copied, number, done = _ANSWER.unpack(answer.numpy().tobytes())
            if not copied:
                what = f"sending to rank {peer}"
                raise RuntimeError(f"{self._group._messages.failed(self._step, what)}: it could not copy the tensor")
            self._group._wait_theirs(done, native_cuda.stream(self._group._device))
            self._group._released[peer].append(number)
            self._group._reuse(ready)
