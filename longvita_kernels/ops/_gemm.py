"""What the ops on the native matrix product (csrc/cpu/gemm) share on the Python side."""

import torch

from longvita_kernels import native

# Working memory that waits for the next call: at most one buffer, of at most 16 MiB a thread. Memory from the system has to be cleared
# when it is touched first, on two cores 0.29 ms a MiB: a projector of 12 tiles would spend 4 % of its time on that.
_waiting = []
_LIMIT = 16 << 18  # floats a thread


def take(floats):
    """A float32 buffer of at least that many elements, nobody else's until it is given back."""
    try:
        buffer = _waiting.pop()  # one step, so that threads cannot take the same
    except IndexError:
        buffer = None
    if buffer is None or buffer.numel() < floats:
        buffer = torch.empty(floats, dtype=torch.float32)
    return buffer


def give_back(buffer):
    """For the next call; when it is not called (an exception), the buffer is simply freed."""
    if buffer.numel() <= _LIMIT * torch.get_num_threads():
        _waiting[:] = (buffer,)


def scratch_floats():
    """Working memory of the matrix product for the current number of threads: about 7.7 MiB each."""
    return torch.get_num_threads() * native.load().gemm_scratch_floats()


def dense_rows(tensor):
    """The tensor itself if its last dimension is dense (what the kernels read), else a copy."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()
