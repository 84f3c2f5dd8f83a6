"""pixel_shuffle_projection beyond its spec: the shuffle itself, memory, exact bits, error messages."""

import pytest
import torch

from longvita_kernels import pixel_shuffle_projection, testing


def _inputs(tiles=2, grid=(4, 6), channels=8, hidden=16, out=24, dtype=torch.float32):
    width = 4 * channels
    x = torch.randn(tiles, grid[0] * grid[1] + 1, channels, dtype=dtype)
    ln_weight, ln_bias = torch.rand(width, dtype=dtype) + 0.5, torch.randn(width, dtype=dtype)
    return x, ln_weight, ln_bias, torch.randn(hidden, width, dtype=dtype) / 6, torch.randn(out, hidden, dtype=dtype) / 4


def test_tokens_are_two_by_two_patches_in_reading_order():
    """The published formula, element by element: s[n, i, j, (dr·2 + dc)·C + c] = x[n, 2i + dr, 2j + dc, c]."""
    tiles, rows, cols, channels = 2, 4, 6, 3
    x, ln_weight, ln_bias, w1, w2 = _inputs(tiles, (rows, cols), channels)
    shuffled = torch.empty(tiles, rows // 2, cols // 2, 4 * channels)
    for i in range(rows // 2):
        for j in range(cols // 2):
            for dr in range(2):
                for dc in range(2):
                    corner = (dr * 2 + dc) * channels
                    shuffled[:, i, j, corner : corner + channels] = x[:, 1 + (2 * i + dr) * cols + 2 * j + dc]
    normed = torch.nn.functional.layer_norm(shuffled.flatten(1, 2), (4 * channels,), ln_weight, ln_bias, 1e-5)
    expected = torch.nn.functional.gelu(normed @ w1.T) @ w2.T
    torch.testing.assert_close(pixel_shuffle_projection(x, ln_weight, ln_bias, w1, w2, grid=(rows, cols)), expected, rtol=1e-5, atol=1e-5)


def test_the_class_token_is_never_read_and_gets_no_gradient():
    inputs = _inputs()
    inputs[0][:, 0] = float("nan")
    inputs[0].requires_grad_()
    out = pixel_shuffle_projection(*inputs, grid=(4, 6))
    out.sum().backward()
    assert out.isfinite().all() and not inputs[0].grad[:, 0].any() and inputs[0].grad[:, 1:].isfinite().all()


def test_a_view_past_the_class_token_gives_the_same_bits():
    x, *rest = _inputs()
    whole = pixel_shuffle_projection(x, *rest, grid=(4, 6))
    testing.assert_bit_equal(pixel_shuffle_projection(x[:, 1:], *rest, grid=(4, 6), class_token=False), whole)


def test_statistics_are_exact_where_the_mean_dwarfs_the_spread():
    x, *rest = _inputs()
    x = (x * 64).round() / 64  # so that adding 1000 loses nothing
    shifted = pixel_shuffle_projection(x + 1000, *rest, grid=(4, 6))
    torch.testing.assert_close(shifted, pixel_shuffle_projection(x, *rest, grid=(4, 6)), rtol=2e-3, atol=2e-3)


def test_no_shuffled_copy_exists():
    """What torch hands out beside the gradient of x grows by the (tokens, D) matrices: by nothing of the size of x."""

    def memory(tiles):
        x, ln_weight, ln_bias, w1, w2 = _inputs(tiles=tiles, grid=(16, 16), channels=16, hidden=4, out=4)
        x.requires_grad_()
        with testing.poisoned_empty() as shapes:
            pixel_shuffle_projection(x, ln_weight, ln_bias, w1, w2, grid=(16, 16)).sum().backward()
        return sum(torch.Size(shape).numel() for shape in shapes if tuple(shape) != tuple(x.shape)), x.numel()

    (few, small), (many, large) = memory(30), memory(90)
    assert many - few < 0.75 * (large - small), (few, many)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_bits_for_any_number_of_threads(dtype):
    inputs = _inputs(tiles=9, grid=(8, 8), channels=40, hidden=130, out=70, dtype=dtype)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        out = pixel_shuffle_projection(*leaves, grid=(8, 8))
        out.float().square().sum().backward()
        results.append((out.detach(), *(leaf.grad for leaf in leaves)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            testing.assert_bit_equal(a, b)


def test_tiles_do_not_touch_each_other():
    inputs = _inputs(tiles=3)
    whole = pixel_shuffle_projection(*inputs, grid=(4, 6))
    changed = inputs[0].clone()
    changed[1] += 1
    others = pixel_shuffle_projection(changed, *inputs[1:], grid=(4, 6))
    testing.assert_bit_equal(others[[0, 2]], whole[[0, 2]])
    assert not torch.equal(others[1], whole[1])


def test_errors_teach():
    x, *rest = _inputs()
    with pytest.raises(ValueError, match=r"grid is \(3, 8\); expected \(rows, cols\) of patches, two even ints"):
        pixel_shuffle_projection(x, *rest, grid=(3, 8))
    with pytest.raises(ValueError, match=r"x has 25 rows per tile; expected 24 .* pass class_token=True"):
        pixel_shuffle_projection(x, *rest, grid=(4, 6), class_token=False)
    with pytest.raises(ValueError, match=r"x has 24 rows per tile; expected 25 .* pass class_token=False"):
        pixel_shuffle_projection(x[:, 1:], *rest, grid=(4, 6))
    with pytest.raises(ValueError, match=r"x has shape \(2, 25, 8\); expected \(N, rows·cols \+ 1, C\)"):
        pixel_shuffle_projection(x, *rest, grid=(4, 4))
    with pytest.raises(ValueError, match=r"w2 has shape \(24, 15\); expected \(O, D\)"):
        pixel_shuffle_projection(x, *rest[:3], rest[3][:, :15].contiguous(), grid=(4, 6))
    with pytest.raises(ValueError, match=r"b1 has shape \(5,\); expected \(D,\)"):
        pixel_shuffle_projection(x, *rest, b1=torch.zeros(5), grid=(4, 6))
    with pytest.raises(ValueError, match=r"x has stride"):
        pixel_shuffle_projection(torch.randn(2, 8, 25).transpose(1, 2), *rest, grid=(4, 6))
