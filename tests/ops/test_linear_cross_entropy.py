"""linear_cross_entropy beyond its spec: statistics, ignored rows, memory, exact bits, a vocabulary in parts, error messages."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from longvita_kernels import backends, linear_cross_entropy, testing
from longvita_kernels.spec import all_specs


def _inputs(tokens=50, width=24, vocab=90, dtype=torch.float32, supervised=0.7):
    hidden, weight = torch.randn(tokens, width, dtype=dtype), torch.randn(vocab, width, dtype=dtype) / 3
    labels = torch.randint(vocab, (tokens,))
    labels[torch.rand(tokens) >= supervised] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_agrees_with_torch(reduction, smoothing):
    hidden, weight, labels = _inputs()
    ours, theirs = ([hidden.clone().requires_grad_(), weight.clone().requires_grad_()] for _ in range(2))
    loss = linear_cross_entropy(*ours, labels, reduction=reduction, label_smoothing=smoothing)
    expected = F.cross_entropy(theirs[0] @ theirs[1].T, labels, reduction=reduction, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_stats():
    hidden, weight, labels = _inputs()
    logits, kept = hidden @ weight.T, labels != -100
    labels[kept.nonzero()[0, 0]] = logits[kept.nonzero()[0, 0]].argmax()  # at least one is right
    for leaf in (hidden, hidden.clone().requires_grad_()):
        loss, stats = linear_cross_entropy(leaf, weight, labels, return_stats=True)
        assert stats.n_supervised == kept.sum() and stats.n_correct == (logits.argmax(1) == labels).sum() >= 1
        torch.testing.assert_close(stats.lse_square_sum, logits.logsumexp(1)[kept].square().sum())
        assert not any(value.requires_grad for value in stats)
        testing.assert_bit_equal(loss.detach(), linear_cross_entropy(leaf, weight, labels).detach())


def test_ignored_rows_are_never_read():
    hidden, weight, labels = _inputs()
    ignored = labels == -100
    hidden[ignored] = float("nan")
    for reduction in ("sum", "mean", "none"):
        leaf, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = linear_cross_entropy(leaf, head, labels, reduction=reduction)
        loss.sum().backward()
        assert loss.isfinite().all() and head.grad.isfinite().all()
        assert not leaf.grad[ignored].any() and leaf.grad[~ignored].isfinite().all()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_nothing_supervised_gives_zero(reduction):
    hidden, weight, labels = _inputs(supervised=0.0)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction)
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not weight.grad.any()


def test_loss_weight_takes_no_gradient_and_zero_weight_is_no_nan():
    hidden, weight, labels = _inputs()
    factor = torch.zeros(50).requires_grad_()
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, loss_weight=factor, reduction="mean")
    loss.backward()
    assert loss == 0 and factor.grad is None and not hidden.grad.any()


def test_logits_are_never_whole():
    hidden, weight, labels = _inputs(tokens=3000, width=8, vocab=4100, supervised=1.0)
    hidden.requires_grad_(), weight.requires_grad_()
    for reduction in ("sum", "none"):
        with testing.poisoned_empty() as shapes:
            linear_cross_entropy(hidden, weight, labels, reduction=reduction).sum().backward()
        assert max(torch.Size(shape).numel() for shape in shapes) <= 4 << 20 < labels.numel() * weight.shape[0]


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_gradients_are_allocated_once(backend):
    hidden, weight, labels = _inputs()
    hidden.requires_grad_(), weight.requires_grad_()
    with backends.use(backend), testing.poisoned_empty() as shapes:
        loss = linear_cross_entropy(hidden, weight, labels)
    supervised = int((labels != -100).sum())
    expected = 1 if backend == "native" else 0  # the others start from zeros
    assert loss.isfinite() and shapes.count((90, 24)) == shapes.count((supervised, 24)) == expected, shapes


def test_a_frozen_input_skips_its_gradient():
    hidden, weight, labels = _inputs(supervised=1.0)
    for reduction in ("sum", "none"):
        leaf = hidden.clone().requires_grad_()
        with testing.poisoned_empty() as shapes:
            linear_cross_entropy(leaf, weight, labels, reduction=reduction).sum().backward()
        assert leaf.grad is not None and tuple(weight.shape) not in shapes


def test_packing_changes_no_row():
    """Each row's loss and gradient have the same bits whatever stands around it."""
    hidden, weight, labels = _inputs(tokens=300, supervised=1.0)
    leaf = hidden.clone().requires_grad_()
    whole = linear_cross_entropy(leaf, weight, labels, reduction="none")
    whole.sum().backward()
    part = hidden[100:170].clone().requires_grad_()
    alone = linear_cross_entropy(part, weight, labels[100:170], reduction="none")
    alone.sum().backward()
    testing.assert_bit_equal(alone.detach(), whole.detach()[100:170])
    testing.assert_bit_equal(part.grad, leaf.grad[100:170])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_same_bits_for_any_number_of_threads(dtype, reduction):
    hidden, weight, labels = _inputs(tokens=700, width=40, vocab=800, dtype=dtype)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = linear_cross_entropy(*leaves, labels, reduction=reduction, softcap=8.0, z_loss=0.01)
        (loss.sum() / 7).backward()
        results.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            testing.assert_bit_equal(a, b)


def test_both_ways_to_the_gradient_agree():
    """The summed loss makes its gradients in the forward pass, the loss of each row in the backward pass."""
    hidden, weight, labels = _inputs()
    options = {"softcap": 4.0, "z_loss": 0.02, "label_smoothing": 0.1, "loss_weight": torch.rand(50)}
    grads = []
    for reduction in ("sum", "none"):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        (linear_cross_entropy(*leaves, labels, reduction=reduction, **options).sum() * 0.3).backward()
        grads.append([leaf.grad for leaf in leaves])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


_PART = """
import sys, torch, torch.distributed as dist
from longvita_kernels import linear_cross_entropy
rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
torch.manual_seed(0)
hidden, weight, labels = torch.randn(40, 16), torch.randn(70, 16), torch.randint(70, (40,))
labels[::5] = -100
options = dict(reduction="mean", softcap=6.0, z_loss=0.02, label_smoothing=0.1, loss_weight=torch.rand(40), return_stats=True)
start, stop = ((0, 25), (25, 70))[rank]
leaves = hidden.clone().requires_grad_(), weight[start:stop].clone().requires_grad_()
loss, stats = linear_cross_entropy(*leaves, labels, vocab_start=start, vocab_group=dist.group.WORLD, **options)
loss.backward()
whole = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
expected, expected_stats = linear_cross_entropy(*whole, labels, **options)
expected.backward()
close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
close(loss, expected), close(leaves[0].grad, whole[0].grad), close(leaves[1].grad, whole[1].grad[start:stop])
for a, b in zip(stats, expected_stats): close(a, b)
for reduction in ("sum", "mean", "none"):  # a frozen head and nothing supervised
    leaf, nothing = hidden.clone().requires_grad_(), torch.full((40,), -100)
    part = weight[start:stop]
    linear_cross_entropy(leaf, part, nothing, reduction=reduction, vocab_start=start, vocab_group=dist.group.WORLD).sum().backward()
    assert torch.equal(leaf.grad, torch.zeros_like(leaf)), reduction
labels[3] = 70
try:
    linear_cross_entropy(*leaves, labels, vocab_start=start, vocab_group=dist.group.WORLD)
    raise SystemExit("a label outside the whole vocabulary was accepted")
except ValueError as error:
    assert "labels[3] is 70; expected 0 … 69" in str(error), error
dist.barrier()  # a rank that leaves early aborts the other in gloo
dist.destroy_process_group()
"""


def test_a_vocabulary_in_two_processes(tmp_path):
    command = [sys.executable, "-c", _PART]
    parts = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(2)
    ]
    outputs = [part.communicate(timeout=500)[0] for part in parts]
    assert [part.returncode for part in parts] == [0, 0], "\n".join(outputs)


def test_errors_teach():
    hidden, weight, labels = _inputs(supervised=1.0)
    for bad in (90, -1):
        wrong = labels.clone()
        wrong[[7, 9]] = bad
        for leaf in (hidden, hidden.clone().requires_grad_()):
            with pytest.raises(ValueError, match=rf"labels\[7\] is {bad}; expected 0 … 89, or ignore_index = -100. Remedy"):
                linear_cross_entropy(leaf, weight, wrong)
    with pytest.raises(ValueError, match=r"labels\[3\] is 95"):  # counted in the caller's rows, not in those that are left
        linear_cross_entropy(hidden.requires_grad_(), weight, torch.tensor([-100, 4, -100, 95] + [0] * 46))
    with pytest.raises(ValueError, match=r"labels has shape \(49,\); expected \(T,\) = \(50,\)"):
        linear_cross_entropy(hidden, weight, labels[1:])
    with pytest.raises(ValueError, match="labels has dtype int32"):
        linear_cross_entropy(hidden, weight, labels.int())
    with pytest.raises(ValueError, match="reduction is 'avg'; expected 'sum', 'mean' or 'none'"):
        linear_cross_entropy(hidden, weight, labels, reduction="avg")
    with pytest.raises(ValueError, match="weight has 0 rows"):
        linear_cross_entropy(hidden, weight[:0], labels)
    for wrong in ({"softcap": -1.0}, {"softcap": float("nan")}, {"softcap": float("inf")}, {"z_loss": float("nan")}):
        with pytest.raises(ValueError, match="expected softcap ≥ 0"):
            linear_cross_entropy(hidden, weight, labels, **wrong)
    with pytest.raises(ValueError, match="vocab_start is 4 without vocab_group"):
        linear_cross_entropy(hidden, weight, labels, vocab_start=4)
    with pytest.raises(ValueError, match=r"loss_weight has shape \(3,\)"):
        linear_cross_entropy(hidden, weight, labels, loss_weight=torch.ones(3))


def test_without_gradients_the_loss_is_the_same():
    """No gradient to come: one native call, whose sums have another order."""
    for sample in all_specs()["linear_cross_entropy"].samples(torch.float32, "cpu", 3):
        kwargs = {**sample.kwargs, "return_stats": True}
        with torch.no_grad():
            loss, stats = linear_cross_entropy(*sample.args, **kwargs)
            alone = linear_cross_entropy(*sample.args, **sample.kwargs)
        assert torch.equal(loss, alone), sample.label
        hidden, *rest = sample.args
        expected, expected_stats = linear_cross_entropy(hidden.clone().requires_grad_(), *rest, **kwargs)
        torch.testing.assert_close(loss, expected.detach(), rtol=2e-6, atol=1e-6)
        assert stats[:2] == expected_stats[:2], sample.label
        torch.testing.assert_close(stats.lse_square_sum, expected_stats.lse_square_sum)
