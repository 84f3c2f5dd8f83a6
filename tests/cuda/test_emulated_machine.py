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
@pytest.mark.parametrize("a_from", (0, 1, 2), ids=("copied", "registers", "transposed"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_tiles(dtype, a_from, across):
    """Tensor copies and stores of matrices, their swizzle, descriptors of both kinds, all places of A, all widths, several steps."""
    for n, steps in ((32, 2), (64, 1), (64, 8), (128, 3)):
        a, b = torch.randn(64, 16 * steps).to(dtype), torch.randn(n, 16 * steps).to(dtype)
        given = b.T.contiguous() if across else b
        d = selftest(Machine.shared(), "product", a, given, a_from=a_from, across=across)
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


def test_blocks_take_turns_in_adding_to_global_memory():
    """In any other order the sum of 1e8, 1 and -1e8 would be 1; the last block goes first, so three must run at a time."""
    a = torch.randn(64, 64).bfloat16()
    for seed in range(5):
        d = selftest(Machine(Machine.shared().path, 3, seed), "turns", a, a)
        assert not d.view(-1)[:64].any() and d.view(-1)[64:1024].isnan().all()
    with pytest.raises(EmulatorError, match="waits for a number in global memory to be at least"):
        selftest(Machine(Machine.shared().path, 2), "turns", a, a)


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
    "a source of stores that they do not see": "that thread 0 wrote without an async_fence",
    "a source of stores overwritten": "that a store has not read yet",
    "a store not waited for": "ended with a store under way",
    "two stores to one place": "another one is under way",
    "a turn that never comes": r"deadlock[\s\S]*waits for a number in global memory to be at least",
    "a turn not waited for": "another one is under way|out of turn",
    "a turn that copies know nothing of": "out of turn",
    "a turn given away too early": "another one is under way|out of turn",
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
