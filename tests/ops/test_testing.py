"""The comparison rule and the poisoned allocator: that they accept what they must, and above all reject what they must."""

import math

import pytest
import torch

from longvita_kernels import testing
from longvita_kernels.spec import OpSpec, SampleInput, Tolerance, all_specs


def _case(dtype=torch.float32, shape=(40, 16)):
    ref = torch.randn(shape, dtype=torch.float64)
    base = ref.to(dtype)
    return base.clone(), ref, base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_rounded_reference_passes(dtype):
    testing.assert_accurate(*_case(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["zeros", "5 % off", "swapped row"])
def test_spoiled_results_are_rejected(dtype, kind):
    out, ref, base = _case(dtype)
    wrong = testing.spoiled(out)[kind]
    with pytest.raises(AssertionError, match="error"):
        testing.assert_accurate(wrong.to(dtype), ref, base)


def test_largest_error_has_exactly_the_stated_limit():
    _, ref, base = _case()
    base[3, 4] += 1e-3
    limit = 2 * (base.double() - ref).abs().max() + 4 * torch.finfo(torch.float32).eps * ref.square().mean().sqrt()
    for share, accepted in ((0.999, True), (1.001, False)):
        out = ref.clone()
        out[7, 7] += share * limit
        only_largest = Tolerance(norm_factor=math.inf)
        problem = testing._bounds_violation(out - ref, base.double() - ref, ref, 0 * ref, torch.finfo(torch.float32).eps, only_largest)
        assert (problem is None) == accepted, (share, problem)


def test_norm_has_exactly_the_stated_limit():
    _, ref, base = _case()
    direction = torch.randn_like(ref)
    limit = 1.5 * (base.double() - ref).norm() + torch.finfo(torch.float32).eps * ref.norm()
    for share, accepted in ((0.999, True), (1.001, False)):
        error = direction * (share * limit / direction.norm())
        only_norm = Tolerance(max_factor=math.inf)
        problem = testing._bounds_violation(error, base.double() - ref, ref, 0 * ref, torch.finfo(torch.float32).eps, only_norm)
        assert (problem is None) == accepted, (share, problem)


def test_what_the_definition_moves_by_widens_both_limits():
    _, ref, base = _case()
    moved = 1e-3 * torch.rand_like(ref)
    eps, largest = torch.finfo(torch.float32).eps, Tolerance(norm_factor=math.inf)
    most = 2 * (base.double() - ref).abs().max() + 4 * eps * ref.square().mean().sqrt() + 8 * moved.max()
    norm = 1.5 * (base.double() - ref).norm() + eps * ref.norm() + 2 * moved.norm()
    direction = torch.ones_like(ref) / ref.numel() ** 0.5
    for share, accepted in ((0.999, True), (1.001, False)):
        out = ref.clone()
        out[7, 7] += share * most
        assert (testing._bounds_violation(out - ref, base.double() - ref, ref, moved, eps, largest) is None) == accepted
        error = share * norm * direction
        assert (testing._bounds_violation(error, base.double() - ref, ref, moved, eps, Tolerance()) is None) == accepted


def test_a_base_that_is_right_by_chance_bounds_nothing_where_a_sum_cancels():
    """A sum of 256 terms whose base is exact: other orders of summation err, and one that loses a term is still found."""
    x, y = (torch.randn(64, 256) for _ in "xy")
    y[:, -1] = -(x[:, :-1].double() * y[:, :-1]).sum(1) / x[:, -1]  # cancels up to the rounding of the last
    ref = (x.double() * y).sum(1)
    share = torch.finfo(torch.float32).eps * (2 * torch.rand(2, 64, 256, dtype=torch.float64) - 1)
    moved = (x * (1 + share[0]) * y * (1 + share[1])).sum(1) - ref
    out = torch.stack([(x[:, i::16] * y[:, i::16]).sum(1) for i in range(16)]).sum(0)
    with pytest.raises(AssertionError, match="largest error"):
        testing.assert_accurate(out, ref, ref)
    testing.assert_accurate(out, ref, ref, moved=moved.abs())
    with pytest.raises(AssertionError, match="largest error"):
        testing.assert_accurate(out - x[:, 0] * y[:, 0], ref, ref, moved=moved.abs())


def test_few_elements_are_judged_as_a_pool():
    refs = [torch.randn(testing.POOL // 4, dtype=torch.float64) for _ in range(4)]
    outs, bases = ([ref + 1e-3 * torch.randn_like(ref) for ref in refs] for _ in range(2))
    testing.assert_accurate(outs, refs, bases)
    wrong = [ref + 1.9 * (base - ref).abs().max() for ref, base in zip(refs, bases, strict=True)]  # less than the largest error may be
    assert testing.violation(wrong[0], refs[0], bases[0]) is None
    with pytest.raises(AssertionError, match="error norm"):
        testing.assert_accurate(wrong, refs, bases)
    testing.assert_accurate(wrong[:1], refs, bases)  # the op ran on the first draw alone
    with pytest.raises(AssertionError, match="largest error"):
        testing.assert_accurate([outs[0] * 1.05], refs, bases)
    outs[2][3] = float("nan")
    with pytest.raises(AssertionError, match=r"draw 2: 1 of 8 elements are NaN, first at \(3,\)"):
        testing.assert_accurate(outs, refs, bases)


@pytest.mark.parametrize("spec", all_specs().values(), ids=lambda spec: spec.name)
def test_pools_are_large_enough_and_draws_differ(spec):
    for draws in testing.pools(spec, torch.float32, seed=3):
        assert len({draw.label for draw in draws}) == 1
        sizes = {}
        for draw in draws:
            for name, x in testing.run(spec.reference, spec, draw, wrt=()).outputs.items():
                sizes[name] = sizes.get(name, 0) + int(x.isfinite().sum())
        assert all(size == 0 or size >= testing.POOL for size in sizes.values()), (draws[0].label, sizes)
        if len(draws) > 1:
            first, second = (next(x for x in draw.args if isinstance(x, torch.Tensor) and x.is_floating_point()) for draw in draws[:2])
            assert first.numel() == 0 or not torch.equal(first, second)


def test_an_op_that_rounds_to_codes_is_allowed_no_movement():
    """Moved by one rounding, a number between two codes would jump from one to the other."""
    assert [name for name, spec in all_specs().items() if not spec.smooth] == ["append_kv"]
    spec = all_specs()["append_kv"]
    assert testing.yardstick(spec, next(spec.samples(torch.float32, "cpu", 0))).moved is None


def test_a_single_bad_element_in_many_is_rejected():
    out, ref, base = _case(shape=(1000, 100))
    out[500, 50] += 1e-4
    with pytest.raises(AssertionError, match="largest error"):
        testing.assert_accurate(out, ref, base)


def test_nan_is_rejected_and_located():
    out, ref, base = _case()
    out[2, 3] = float("nan")
    with pytest.raises(AssertionError, match=r"1 of 640 elements are NaN, first at \(2, 3\)"):
        testing.assert_accurate(out, ref, base)


def test_infinities_must_stand_in_the_same_places_with_the_same_sign():
    out, ref, base = _case()
    for tensor in (out, ref, base):
        tensor[0, 0] = float("-inf")
    testing.assert_accurate(out, ref, base)
    for value in (0.0, float("inf")):
        out[0, 0] = value
        with pytest.raises(AssertionError, match="infinities do not match in 1 places"):
            testing.assert_accurate(out, ref, base)
    out[0, 0], out[1, 1] = float("-inf"), float("-inf")
    with pytest.raises(AssertionError, match=r"first at \(1, 1\)"):
        testing.assert_accurate(out, ref, base)


def test_a_base_that_overflows_bounds_nothing():
    out, ref, base = _case()
    base[0, 0] = float("inf")
    with pytest.raises(AssertionError, match="base is not finite"):
        testing.assert_accurate(out, ref, base)


def test_shapes_and_the_dtype_of_the_reference_are_checked():
    out, ref, base = _case()
    with pytest.raises(AssertionError, match="shapes differ"):
        testing.assert_accurate(out[:1], ref, base)
    with pytest.raises(AssertionError, match="must be float64"):
        testing.assert_accurate(out, ref.float(), base)


def test_a_looser_tolerance_needs_a_reason():
    example = all_specs()["merge_attention"]
    fields = {name: getattr(example, name) for name in example.__dataclass_fields__}
    with pytest.raises(ValueError, match="gives no reason"):
        OpSpec(**{**fields, "tolerances": {("out", None): Tolerance(max_factor=8.0)}})
    loose = OpSpec(**{**fields, "tolerances": {("out", torch.float16): Tolerance(max_factor=8.0, reason="for this test")}})
    assert loose.tolerance("out", torch.float16).max_factor == 8.0
    assert loose.tolerance("out", torch.float32) == Tolerance() == loose.tolerance("lse", torch.float16)


def test_bit_equality_sees_the_sign_of_zero_and_accepts_nan():
    testing.assert_bit_equal(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    with pytest.raises(AssertionError, match="1 of 4 bytes differ"):
        testing.assert_bit_equal(torch.tensor([0.0]), torch.tensor([-0.0]))
    with pytest.raises(AssertionError, match="float32"):
        testing.assert_bit_equal(torch.zeros(1), torch.zeros(1, dtype=torch.float64))


def test_poisoned_buffers():
    with testing.poisoned_empty() as shapes:
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.zeros(2, dtype=torch.bfloat16)).isnan().all()
        assert torch.zeros(1).new_empty(4, dtype=torch.float16).isnan().all()
        assert torch.empty_strided((2, 2), (2, 1)).isnan().all()
        assert torch.empty(2, dtype=torch.float8_e4m3fn).float().isnan().all()
        assert int(torch.empty(2, dtype=torch.int32).min()) > 2**30
        assert torch.empty(2, device="meta").shape == (2,)
    assert shapes == [(3,), (2,), (4,), (2, 2), (2,), (2,), (2,)]
    assert torch.empty is not None and "allocate" not in torch.empty.__name__ and "allocate" not in torch.Tensor.new_empty.__name__


def test_poison_is_removed_after_an_error():
    original = torch.empty
    with pytest.raises(KeyError), testing.poisoned_empty():
        raise KeyError
    assert torch.empty is original


def _toy(op):
    def reference(x, y):
        return x * y, x + y

    def samples(dtype, device, seed):
        generator = torch.Generator().manual_seed(seed)
        yield SampleInput("only", tuple(torch.randn(9, 8, generator=generator).to(device, dtype) for _ in "xy"), {}, ("x", "y"))

    return OpSpec(
        name="toy", op=op, reference=reference, base=reference, samples=samples, outputs=("product", "sum"),
        bytes=lambda sample: 0, flops=lambda sample: 0, flat_calls=lambda sample: iter(()),
    )  # fmt: skip


class _Product(torch.autograd.Function):
    """x·y whose gradient for y is wrong by 5 %."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        return grad * y, 1.05 * grad * x


def test_check_sample_accepts_a_right_op_and_names_a_wrong_gradient():
    right, wrong = _toy(lambda x, y: (x * y, x + y)), _toy(lambda x, y: (_Product.apply(x, y), x + y))
    (sample,) = right.samples(torch.float32, "cpu", 0)
    got = testing.check_sample(right, sample)
    assert set(got.outputs) == {"product", "sum"} and set(got.grads) == {"x", "y"}
    with pytest.raises(AssertionError, match=r"toy\[only\] grad y: largest error"):
        testing.check_sample(wrong, sample)
    testing.check_sample(wrong, sample, wrt=("x",))
    testing.check_sample(wrong, sample, used=("sum",))


def test_check_sample_catches_memory_left_unwritten():
    def forgetful(x, y):
        out = torch.empty_like(x)
        out[:-1] = (x * y)[:-1]
        return out, x + y

    spec = _toy(forgetful)
    (sample,) = spec.samples(torch.float32, "cpu", 0)
    with pytest.raises(AssertionError, match="product: 8 of 72 elements are NaN"):
        testing.check_sample(spec, sample, wrt=())
