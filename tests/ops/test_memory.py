from pathlib import Path

import pytest
import torch

from longvita_kernels import memory, testing
from longvita_kernels.ops import _gemm

SMAPS = Path("/proc/self/smaps")


def flags_of(address):
    """VmFlags of the mapping that an address lies in."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    raise AssertionError(f"no mapping holds {address:#x}")


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux's /proc")
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages")
def test_a_large_tensor_asks_for_huge_pages():
    size = 64 << 20  # large enough to be a mapping of its own
    plain, tensor = torch.empty(size, dtype=torch.uint8), memory.empty(2, size // 4, dtype=torch.bfloat16)
    assert tensor.shape == (2, size // 4) and tensor.dtype == torch.bfloat16 and tensor.is_contiguous()
    assert "hg" in flags_of(tensor.data_ptr() + size // 2)
    assert "hg" not in flags_of(plain.data_ptr() + size // 2)
    tensor.fill_(3.0)
    assert float(tensor.float().sum()) == 3.0 * size / 2


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (1 << 20,)])
def test_a_small_tensor_is_like_any_other(shape):
    tensor = memory.empty(shape, dtype=torch.float32, device="cpu")
    assert tensor.shape == shape and tensor.dtype == torch.float32
    tensor.fill_(1.0)
    assert tensor.sum() == tensor.numel()


def test_other_devices_get_what_torch_gives():
    assert memory.empty(8 << 20, dtype=torch.uint8, device="meta").device.type == "meta"


def test_the_workspace_of_one_call_serves_the_next(monkeypatch):
    monkeypatch.setattr(_gemm, "_waiting", [])
    first = _gemm.take(1000)
    other = _gemm.take(1000)
    assert first.data_ptr() != other.data_ptr()  # two threads never share one
    _gemm.give_back(first)
    again = _gemm.take(500)
    assert again.data_ptr() == first.data_ptr()
    _gemm.give_back(again)
    larger = _gemm.take(2000)
    assert larger.numel() >= 2000 and _gemm._waiting == []
    _gemm.give_back(larger)
    _gemm.give_back(other)
    assert len(_gemm._waiting) == 1
    huge = torch.empty(_gemm._LIMIT * torch.get_num_threads() + 1, device="meta")
    _gemm._waiting.clear()
    _gemm.give_back(huge)
    assert _gemm._waiting == []


def test_poisoned_calls_never_get_a_used_workspace():
    used = _gemm.take(1 << 16).fill_(0.0)
    _gemm.give_back(used)
    with testing.poisoned_empty():
        assert torch.isnan(_gemm.take(1 << 10)).all()
        assert torch.isnan(_gemm.take(1 << 10)).all()
