"""How accuracy is judged here, usable for your own kernels: the comparison rule, poisoned buffers, and runs of an `OpSpec`.

The rule (`assert_accurate`): `ref` is the definition in float64, unrounded; `base` the plain torch composition in the inputs' dtype. Over
all elements of an output or gradient

    max|out − ref| ≤ 2·max|base − ref| + 4·eps·rms(ref)      and      ‖out − ref‖ ≤ 1.5·‖base − ref‖ + eps·‖ref‖

with eps of the output's dtype. Infinities must stand in the same places; then the finite part is compared. NaN fails. There are no reruns
and no share of allowed mismatches; a looser factor stands in the OpSpec with its reason.
"""

import contextlib
from dataclasses import dataclass

import torch

from longvita_kernels.ops import _gemm
from longvita_kernels.spec import FLOAT_DTYPES, Tolerance

# ------------------------------------------------------------------------------------------------------------------------------- the rule


def violation(out, ref, base, tolerance=None):
    """What is wrong with `out` under the rule, in words, or None if it holds.

    out   the tensor under test, any dtype; an integer tensor counts as having the eps of float32
    ref   float64, same shape; base same shape, any dtype. tolerance: spec.Tolerance, default the rule as it stands
    """
    tolerance = tolerance or Tolerance()
    if ref.dtype != torch.float64:
        return f"the reference must be float64 (unrounded); got {ref.dtype}"
    if not out.shape == ref.shape == base.shape:
        return f"shapes differ: out {tuple(out.shape)}, ref {tuple(ref.shape)}, base {tuple(base.shape)}"
    eps = torch.finfo(out.dtype if out.is_floating_point() else torch.float32).eps
    out, ref, base = (t.detach().to("cpu", torch.float64) for t in (out, ref, base))
    if out.isnan().any():
        return f"{int(out.isnan().sum())} of {out.numel()} elements are NaN, first at {_first(out.isnan())}"
    infinite = ref.isinf()
    misplaced = torch.where(infinite, out != ref, out.isinf())
    if misplaced.any():
        at = _first(misplaced)
        return f"infinities do not match in {int(misplaced.sum())} places, first at {at}: out {float(out[at])}, ref {float(ref[at])}"
    out, ref, base = out[~infinite], ref[~infinite], base[~infinite]
    if not base.isfinite().all():
        return "base is not finite where ref is, so it bounds nothing; choose smaller sample values or a better base"
    if ref.numel() == 0:
        return None
    return _bounds_violation(out - ref, base - ref, ref, eps, tolerance)


def _bounds_violation(error, base_error, ref, eps, tolerance):
    worst, base_worst, rms = float(error.abs().max()), float(base_error.abs().max()), float(ref.square().mean().sqrt())
    limit = tolerance.max_factor * base_worst + 4 * eps * rms
    if worst > limit:
        return f"largest error {worst:.3e} exceeds {limit:.3e} (base {base_worst:.3e}, rms {rms:.3e})"
    norm, base_norm, ref_norm = float(error.norm()), float(base_error.norm()), float(ref.norm())
    limit = tolerance.norm_factor * base_norm + eps * ref_norm
    if norm > limit:
        return f"error norm {norm:.3e} exceeds {limit:.3e} (base {base_norm:.3e}, ‖ref‖ {ref_norm:.3e})"
    return None


def _first(mask):
    return tuple(mask.nonzero()[0].tolist())


def assert_accurate(out, ref, base, *, name="output", tolerance=None):
    """Raise AssertionError, saying by how much, unless `out` obeys the rule at the top of this module. Arguments as in `violation`."""
    problem = violation(out, ref, base, tolerance)
    if problem is not None:
        raise AssertionError(f"{name}: {problem}")


def assert_bit_equal(a, b, *, name="tensor"):
    """Raise AssertionError unless dtype, shape and every bit agree (NaN equals the same NaN; 0.0 differs from -0.0)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        raise AssertionError(f"{name}: {a.dtype} {tuple(a.shape)} against {b.dtype} {tuple(b.shape)}")
    bits_a, bits_b = (t.detach().contiguous().cpu().reshape(-1).view(torch.uint8) for t in (a, b))
    if not torch.equal(bits_a, bits_b):
        raise AssertionError(f"{name}: {int((bits_a != bits_b).sum())} of {bits_a.numel()} bytes differ")


# -------------------------------------------------------------------------------------------------------------------- poisoned allocator

_ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch, "empty_permuted"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


def poison(tensor):
    """Fill with the least useful values: NaN, or for integers a large number with a pattern; returns the tensor."""
    if tensor.device.type == "meta" or isinstance(tensor, torch._subclasses.FakeTensor):
        return tensor
    with torch.no_grad():
        if tensor.is_floating_point() and tensor.element_size() == 1:  # fp8 e4m3: 0x7f is its NaN
            tensor.view(torch.uint8).fill_(0x7F)
        elif tensor.is_floating_point() or tensor.is_complex():
            tensor.fill_(float("nan"))
        elif tensor.dtype == torch.bool:
            tensor.fill_(True)
        else:
            tensor.fill_(torch.iinfo(tensor.dtype).max // 3 * 2)
    return tensor


@contextlib.contextmanager
def poisoned_empty():
    """Inside the block every uninitialised tensor made from Python starts as NaN (integers: large garbage), so that whatever a kernel
    forgets to write, or reads before writing, shows. Yields a list that gets the shape of each such tensor.

    Not for code being traced by torch.compile.
    """
    shapes = []
    originals = [(owner, name, getattr(owner, name)) for owner, name in _ALLOCATORS]
    take = _gemm.take

    def poisoning(original):
        def allocate(*args, **kwargs):
            tensor = poison(original(*args, **kwargs))
            shapes.append(tuple(tensor.shape))
            return tensor

        return allocate

    try:
        for owner, name, original in originals:
            setattr(owner, name, poisoning(original))
        _gemm.take = lambda floats: torch.empty(floats, dtype=torch.float32)  # none that was used before
        yield shapes
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
        _gemm.take = take
        _gemm._waiting.clear()


# ------------------------------------------------------------------------------------------------------------------------ running specs


@dataclass(frozen=True)
class Run:
    """Outputs by name, and gradients by parameter name, of one call."""

    outputs: dict
    grads: dict


def _double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.dtype in FLOAT_DTYPES else value


def cotangent(output, index):
    """The fixed random gradient that flows into output number `index`, in its dtype."""
    generator = torch.Generator("cpu").manual_seed(1000 + index)
    values = torch.randn(output.shape, generator=generator, dtype=torch.float32, device="cpu")
    return values.to(output.device, output.dtype)


def run(function, spec, sample, *, wrt=None, used=None, double=False, cotangents=None):
    """Call `function` (spec.op, spec.reference or spec.base) on a sample and differentiate it.

    wrt        parameters to differentiate by (the others are frozen); None: all that the sample names; (): forward only
    used       output names the gradient flows from; None: all
    double     in float64, as for `ref`
    cotangents gradients to use, one per output; default `cotangent`
    """
    wrt = sample.differentiable if wrt is None else wrt
    arguments = {name: _double(value) if double else value for name, value in spec.bind(sample).items()}
    for name in wrt:
        arguments[name] = arguments[name].detach().requires_grad_()
    outputs = function(**arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if len(outputs) != len(spec.outputs):
        raise ValueError(f"{spec.name} gave {len(outputs)} outputs for {sample.label!r}; its spec names {spec.outputs}")
    by_name = dict(zip(spec.outputs, outputs, strict=True))
    flowing = [i for i, name in enumerate(spec.outputs) if (used is None or name in used) and outputs[i].requires_grad]
    if not wrt or not flowing:
        return Run({name: out.detach() for name, out in by_name.items()}, {name: torch.zeros_like(arguments[name]) for name in wrt})
    incoming = [cotangents[i] if cotangents is not None else cotangent(outputs[i], i) for i in flowing]
    incoming = [grad.to(outputs[i].dtype) for i, grad in zip(flowing, incoming, strict=True)]
    grads = torch.autograd.grad(
        [outputs[i] for i in flowing], [arguments[name] for name in wrt], incoming, allow_unused=True, materialize_grads=True
    )
    return Run({name: out.detach() for name, out in by_name.items()}, dict(zip(wrt, grads, strict=True)))


@dataclass(frozen=True)
class Yardstick:
    """What a run of the op is held against: the float64 definition and the same-dtype composition, on the same cotangents."""

    ref: Run
    base: Run
    cotangents: list


def yardstick(spec, sample, *, used=None):
    """Run definition and composition once; the cotangents have the dtypes of the op's own outputs."""
    outputs = run(spec.op, spec, sample, wrt=()).outputs
    cotangents = [cotangent(out, i) if out.is_floating_point() else None for i, out in enumerate(outputs.values())]
    ref = run(spec.reference, spec, sample, used=used, double=True, cotangents=cotangents)
    base = run(spec.base, spec, sample, used=used, cotangents=cotangents)
    return Yardstick(ref, base, cotangents)


def violations(spec, sample, got, measure):
    """Every way in which the run `got` breaks the rule, as text lines (empty: it holds)."""
    lines = []
    for name, out in got.outputs.items():
        lines.append((name, violation(out, measure.ref.outputs[name], measure.base.outputs[name], spec.tolerance(name, out.dtype))))
    for name, grad in got.grads.items():
        tolerance = spec.tolerance(f"grad {name}", grad.dtype)
        lines.append((f"grad {name}", violation(grad, measure.ref.grads[name], measure.base.grads[name], tolerance)))
    return [f"{spec.name}[{sample.label}] {name}: {problem}" for name, problem in lines if problem is not None]


def check_sample(spec, sample, *, wrt=None, used=None, measure=None):
    """Run the op on a sample under poisoned buffers and hold it to the rule; raises AssertionError with every violation."""
    measure = measure or yardstick(spec, sample, used=used)
    with poisoned_empty():
        got = run(spec.op, spec, sample, wrt=wrt, used=used, cotangents=measure.cotangents)
    lines = violations(spec, sample, got, measure)
    if lines:
        raise AssertionError("\n".join(lines))
    return got


def check_samples(spec, samples, choices):
    """`check_sample` with each of `choices(sample)`, dicts of its keywords; raises one AssertionError with what all of them found."""
    problems = []
    for sample in samples:
        for choice in choices(sample):
            try:
                check_sample(spec, sample, **choice)
            except AssertionError as error:
                problems.append(f"{sample.label} {choice or ''}\n{error}")
    if problems:
        raise AssertionError("\n".join(problems))


def spoiled(tensor):
    """Wrong versions of a correct tensor that any test of accuracy must reject: {what was done: tensor}. Empty if it holds only zeros."""
    finite = tensor[tensor.isfinite()]
    if finite.numel() == 0 or not bool((finite != 0).any()):
        return {}
    wrong = {"zeros": torch.where(tensor.isfinite(), torch.zeros_like(tensor), tensor), "5 % off": tensor * 1.05}
    if tensor.ndim >= 2:
        rows = tensor.reshape(tensor.shape[0], -1)
        sizes = rows.nan_to_num(0.0, 0.0, 0.0).norm(dim=1)
        first, second = sizes.topk(2).indices.tolist() if len(sizes) > 1 else (0, 0)
        if sizes[second] > 0 and not torch.equal(rows[first], rows[second]) and torch.equal(rows[first].isinf(), rows[second].isinf()):
            swapped = tensor.clone()
            swapped[first], swapped[second] = tensor[second], tensor[first]
            wrong["swapped row"] = swapped
    return wrong
