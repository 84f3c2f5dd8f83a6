"""masked_lm_head beyond its spec: cost, repeated rows, exact bits, error messages."""

import pytest
import torch

from longvita_kernels import masked_lm_head, testing


def _inputs(tokens=40, width=32, vocab=70, dtype=torch.float32):
    return torch.randn(tokens, width, dtype=dtype), torch.randn(vocab, width, dtype=dtype)


def test_bool_rows_equal_their_positions():
    hidden, weight = _inputs()
    mask = torch.rand(40) < 0.4
    testing.assert_bit_equal(masked_lm_head(hidden, weight, mask), masked_lm_head(hidden, weight, mask.nonzero().squeeze(1)))


def test_repeated_rows_add_up_in_float32():
    """400 gradients of 1/256 into one bfloat16 row: adding in bfloat16 would stop at 1."""
    hidden = torch.ones(3, 8, dtype=torch.bfloat16).requires_grad_()
    weight = torch.full((5, 8), 1 / 256, dtype=torch.bfloat16)
    rows = torch.ones(400, dtype=torch.int64)
    masked_lm_head(hidden, weight, rows)[:, 0].sum().backward()
    assert hidden.grad[1].tolist() == [400 / 256] * 8 and not hidden.grad[[0, 2]].any()


def test_rows_nobody_asked_for_are_not_read():
    hidden, weight = _inputs()
    hidden[7:] = float("nan")
    assert masked_lm_head(hidden, weight, torch.tensor([0, 6, 3])).isfinite().all()
    assert masked_lm_head(hidden, weight, torch.arange(7)).isfinite().all()


@pytest.mark.parametrize("rows", [1, 3, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_bits_for_any_number_of_threads(rows, dtype):
    hidden, weight = _inputs(60, 70, 600, dtype)
    index = torch.randint(60, (rows,))
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        logits = masked_lm_head(*leaves, index)
        logits.float().square().sum().backward()
        results.append((logits.detach(), *(leaf.grad for leaf in leaves)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            testing.assert_bit_equal(a, b)


def test_a_frozen_input_gets_no_gradient_and_no_work():
    hidden, weight = _inputs()
    hidden.requires_grad_()
    with testing.poisoned_empty() as shapes:
        masked_lm_head(hidden, weight, torch.arange(5)).sum().backward()
    assert weight.grad is None and tuple(weight.shape) not in shapes


def test_errors_teach():
    hidden, weight = _inputs()
    with pytest.raises(ValueError, match=r"rows\[2\] is 40; expected 0 … 39.*Remedy"):
        masked_lm_head(hidden, weight, torch.tensor([0, 39, 40, 41]))
    with pytest.raises(ValueError, match=r"rows\[0\] is -1; expected 0 … 39"):
        masked_lm_head(hidden, weight, torch.tensor([-1]))
    with pytest.raises(ValueError, match=r"rows has shape \(39,\); expected \(T,\) as bool"):
        masked_lm_head(hidden, weight, torch.ones(39, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"rows has dtype int32; expected one of int64, bool"):
        masked_lm_head(hidden, weight, torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"weight has shape \(70, 31\); expected \(V, H\)"):
        masked_lm_head(hidden, weight[:, :31], torch.arange(3))
    with pytest.raises(ValueError, match="cast one of them"):
        masked_lm_head(hidden, weight.bfloat16(), torch.arange(3))
    with pytest.raises(ValueError, match=r"weight has stride 70.*weight\.contiguous\(\)"):
        masked_lm_head(torch.randn(5, 70), torch.randn(70, 70).T, torch.arange(3))
