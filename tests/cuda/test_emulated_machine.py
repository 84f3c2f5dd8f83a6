"""The emulator itself: what its instructions compute, held to the definitions in the PTX ISA, and that it notices what breaks a rule."""

import fcntl
import os

import pytest
import torch

from tests.cuda import emulated
from tests.cuda.emulated import EmulatorError, Machine, selftest

DTYPES = (torch.bfloat16, torch.float16)


def _as_matrix(d):
    """Accumulators of 128 threads as the matrix they are parts of, after the figure of wgmma's accumulator in the PTX ISA."""
    columns = d.shape[1] * 2
    matrix = torch.full((64, columns), float("nan"))
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for i in range(columns // 2):
            row, column = 16 * warp + lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2
            matrix[row, column] = d[thread, i]
    return matrix


@pytest.mark.parametrize("across", (False, True))
@pytest.mark.parametrize("a_in_registers", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_tiles_that_were_copied(dtype, a_in_registers, across):
    """Tensor copies, their swizzle, descriptors of both kinds, both places of A, both widths, several steps."""
    for n, steps in ((64, 1), (64, 8), (128, 3)):
        a, b = torch.randn(64, 16 * steps).to(dtype), torch.randn(n, 16 * steps).to(dtype)
        given = b.T.contiguous() if across else b
        d = selftest(Machine.shared(), "product", a, given, a_in_registers=a_in_registers, across=across)
        torch.testing.assert_close(_as_matrix(d), a.float() @ b.float().T, rtol=1e-5, atol=1e-4)


def test_every_element_stands_where_the_figures_say():
    """A picks one row of B: the result shows, exactly, where every element of A and of B was read."""
    numbers = torch.arange(64 * 16).view(64, 16) % 251
    for k in range(16):
        a = torch.zeros(64, 16)
        a[:, k] = 1 + torch.arange(64) % 3
        d = selftest(Machine.shared(), "product", a.bfloat16(), numbers.bfloat16())
        assert torch.equal(_as_matrix(d), a[:, k : k + 1] * numbers[:, k].float())


def test_an_operand_without_swizzle():
    """Written by threads in units of 8 rows × 16 bytes, as the ISA draws them: no copy and no swizzle has a part in it."""
    a, b = torch.randn(64, 16).bfloat16(), torch.randn(8, 16).bfloat16()
    d = selftest(Machine.shared(), "plain", a, b)
    torch.testing.assert_close(_as_matrix(d), a.float() @ b.float().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_and_widening_are_torch_s(dtype):
    """Through D = I · B and the kernels' own pack: every finite 16-bit number is read as torch reads it."""
    every = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(dtype)
    every = torch.where(every.isfinite(), every, torch.zeros_like(every))
    eye = torch.eye(64, 64, dtype=dtype)
    for part in every.view(-1, 64, 128)[::2]:  # (k, n)
        assert torch.equal(_as_matrix(selftest(Machine.shared(), "product", eye, part.contiguous(), across=True)), part.float())


WRONG = {
    "a barrier nobody arrives at": r"deadlock[\s\S]*waits for phase 0 of barrier",
    "fewer bytes than expected": r"deadlock[\s\S]*misses 0 arrivals and 16 bytes",
    "half of the block at a barrier": r"deadlock[\s\S]*warp 0 waits for named barrier 0",
    "a barrier not initialised": "never initialised",
    "one arrival too many": "one arrival too many",
    "a product before its copy": "wgmma reads B in shared memory .* that a copy is on its way to",
    "a product without a fence": "without a wgmma.fence",
    "an accumulator overwritten": "accumulators of lane 0 changed",
    "an operand register changed": "A registers of lane 0 changed",
    "a product not waited for": "ended with a wgmma under way",
    "a descriptor inside of a unit": "inside of the unit",
    "a descriptor outside of the memory": "outside of the block's",
    "a write that products do not see": "that thread 5 wrote without an async_fence",
    "a copy over an operand in use": "that a copy is on its way to",
    "a read before its copy": "reads shared memory .* that a copy is on its way to",
    "a box not aligned": "not aligned to 1,024",
    "a warp that diverges": "a warp diverges",
    "a read outside of global memory": "a read of 2 bytes outside",
    "a write outside of global memory": "a write of 4 bytes outside",
    "a write to what is only read": "a write of 2 bytes outside",
    "an address not aligned": "not aligned to 16",
    "too many registers": "65,536",
    "more shared memory than there is": "shared memory of",
}


@pytest.mark.parametrize("name", WRONG)
def test_what_breaks_a_rule_is_noticed(name):
    a = torch.randn(64, 64).bfloat16()
    with pytest.raises(EmulatorError, match=WRONG[name]):
        selftest(Machine.shared(), name, a, a)
    selftest(Machine.shared(), "product", a, a)  # and the machine works on


def test_an_unknown_self_test_is_refused():
    with pytest.raises(ValueError, match="no self-test is called"):
        selftest(Machine.shared(), "nothing", torch.zeros(64, 16).bfloat16(), torch.zeros(64, 16).bfloat16())


def test_old_libraries_are_deleted_but_none_that_somebody_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(emulated, "KEPT", 2)
    for age, name in enumerate("abcd"):
        (tmp_path / f"{name}.so").touch()
        os.utime(tmp_path / f"{name}.so", (1000 - age, 1000 - age))
    with open(tmp_path / "d.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        emulated._prune(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["a.so", "b.so", "d.lock", "d.so"]
    emulated._prune(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["a.so", "b.so"]
