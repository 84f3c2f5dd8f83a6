"""How accuracy is judged here, usable for your own kernels: the comparison rule, poisoned buffers, and runs of an `OpSpec`.

The rule (`assert_accurate`): `ref` is the definition in float64, unrounded; `base` the plain torch composition in the inputs' dtype;
`moved` is how far `ref` moves when every input and incoming gradient is off by up to one rounding of float32. Over all elements of an
output or gradient

    max|out − ref| ≤ 2·max|base − ref| + 4·eps·rms(ref) + 8·max(moved)
    ‖out − ref‖ ≤ 1.5·‖base − ref‖ + eps·‖ref‖ + 2·‖moved‖

with eps of the output's dtype. Infinities must stand in the same places; then the finite part is compared. NaN fails. There are no reruns
and no share of allowed mismatches; a looser factor stands in the OpSpec with its reason.

Two measures remove chance. Where a sum cancels, `base` may be accurate by accident; `moved` measures how ill-conditioned the result is, and
in 16 bits it is far below the error of `base`. And a tensor with few elements gives few errors to judge by, so it is pooled with the same
tensor of the same sample drawn from further seeds (`pools`), until there are `POOL` elements. A slow op may run on the first draws only:
the limit on the largest error still comes from the whole pool, and the norm is checked only if those draws have `POOL` elements.
"""

import contextlib
import dataclasses
import itertools
import math
from dataclasses import dataclass

import torch

from longvita_kernels.ops import _gemm
from longvita_kernels.spec import FLOAT_DTYPES, Tolerance

# ------------------------------------------------------------------------------------------------------------------------------- the rule


# The pool and the factors of `moved` were chosen from the largest ratio of an error to its limit, over the 214 tensors of all samples in
# float32, 60 to 100 seeds, the native, torch and reference backends, ATEN_CPU_CAPABILITY default, avx2 and AVX-512, LONGVITA_ISA portable,
# avx2 and avx512bf16 (Xeon, Ice Lake or later). Judged one by one and without `moved`, up to 24 tensors failed for some seed, the worst at
# 6.5 times its limit, and a run of all had 0.1 to 0.9 failures. Pools of 32 elements alone left 15 failing, the worst at 2.8, as a few rows
# that cancel decide the largest error of a large tensor too. With both the largest ratio is 0.73. In bfloat16 and float16 it is 0.91 one by
# one and without `moved` (native, 200 seeds).
POOL = 32  # elements
MOVES = 2  # times that the inputs are moved; `moved` is the root of the mean square


def violation(out, ref, base, tolerance=None, *, moved=None):
    """What is wrong with `out` under the rule, in words, or None if it holds.

    out    the tensor under test, any dtype; an integer tensor counts as having the eps of float32
    ref    float64, same shape; base same shape, any dtype; moved same shape, or None for 0
    Each of these may be a list, one tensor for each draw: the pool is judged as one tensor. `out` may lack the last draws.
    tolerance  spec.Tolerance; default: the rule as it stands
    """
    tolerance = tolerance or Tolerance()
    outs, refs, bases = (x if isinstance(x, list) else [x] for x in (out, ref, base))
    moves = [torch.zeros_like(x) for x in refs] if moved is None else moved if isinstance(moved, list) else [moved]
    eps = torch.finfo(outs[0].dtype if outs[0].is_floating_point() else torch.float32).eps
    errors, parts = [], []
    for number, (ref, base, moved) in enumerate(zip(refs, bases, moves, strict=True)):
        out = outs[number] if number < len(outs) else base
        problem = _mismatch(out, ref, base)
        if problem is not None:
            return problem if number == 0 else f"draw {number}: {problem}"
        out, ref, base, moved = (x.detach().to("cpu", torch.float64) for x in (out, ref, base, moved))
        finite = ~ref.isinf()
        if number < len(outs):
            errors.append((out - ref)[finite])
        parts.append([x[finite] for x in (base - ref, ref, moved)])
    error, (base_error, ref, moved) = torch.cat(errors), (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return _bounds_violation(error, base_error, ref, moved, eps, tolerance) if error.numel() else None


def _mismatch(out, ref, base):
    """What makes an error meaningless: another dtype or shape, NaN, an infinity in another place."""
    if ref.dtype != torch.float64:
        return f"the reference must be float64 (unrounded); got {ref.dtype}"
    if not out.shape == ref.shape == base.shape:
        return f"shapes differ: out {tuple(out.shape)}, ref {tuple(ref.shape)}, base {tuple(base.shape)}"
    out, ref, base = (t.detach().to("cpu", torch.float64) for t in (out, ref, base))
    if ref.isnan().any():
        return f"{int(ref.isnan().sum())} of {ref.numel()} elements of the reference are NaN, first at {_first(ref.isnan())}"
    if out.isnan().any():
        return f"{int(out.isnan().sum())} of {out.numel()} elements are NaN, first at {_first(out.isnan())}"
    infinite = ref.isinf()
    misplaced = torch.where(infinite, out != ref, out.isinf())
    if misplaced.any():
        at = _first(misplaced)
        return f"infinities do not match in {int(misplaced.sum())} places, first at {at}: out {float(out[at])}, ref {float(ref[at])}"
    if not base[~infinite].isfinite().all():
        return "base is not finite where ref is, so it bounds nothing; choose smaller sample values or a better base"
    return None


def _bounds_violation(error, base_error, ref, moved, eps, tolerance):
    """The two lines of the rule. `error` may be shorter than the others: the op ran on the first draws."""
    worst, base_worst, most_moved = (float(x.abs().max()) for x in (error, base_error, moved))
    rms = float(ref.square().mean().sqrt())
    limit = tolerance.max_factor * base_worst + 4 * eps * rms + 8 * most_moved
    if not worst <= limit:
        return f"largest error {worst:.3e} exceeds {limit:.3e} (base {base_worst:.3e}, rms {rms:.3e}, moved {most_moved:.3e})"
    if error.numel() < POOL:
        return None
    norm, base_norm, ref_norm, moved_norm = (float(x[: error.numel()].norm()) for x in (error, base_error, ref, moved))
    limit = tolerance.norm_factor * base_norm + eps * ref_norm + 2 * moved_norm
    if not norm <= limit:
        return f"error norm {norm:.3e} exceeds {limit:.3e} (base {base_norm:.3e}, ‖ref‖ {ref_norm:.3e}, ‖moved‖ {moved_norm:.3e})"
    return None


def _first(mask):
    return tuple(mask.nonzero()[0].tolist())


def assert_accurate(out, ref, base, *, name="output", tolerance=None, moved=None):
    """Raise AssertionError, saying by how much, unless `out` obeys the rule at the top of this module. Arguments as in `violation`."""
    problem = violation(out, ref, base, tolerance, moved=moved)
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
    """What a run of the op is held against: the float64 definition and the same-dtype composition, on the same cotangents.

    moved: how far the definition moves (see `movement`); None: not measured, which counts as 0.
    """

    ref: Run
    base: Run
    cotangents: list
    moved: Run | None = None


def yardstick(spec, sample, *, used=None, moves=MOVES):
    """Run definition and composition once; the cotangents have the dtypes of the op's own outputs.

    moves  how often the inputs are moved for `Yardstick.moved`; 0 leaves it out, which makes the rule stricter: for tensors so large that
           the definition takes long
    """
    outputs = run(spec.reference, spec, sample, wrt=()).outputs
    cotangents = [cotangent(out, i) if out.is_floating_point() else None for i, out in enumerate(outputs.values())]
    ref = run(spec.reference, spec, sample, used=used, double=True, cotangents=cotangents)
    base = run(spec.base, spec, sample, used=used, cotangents=cotangents)
    moved = movement(spec, sample, ref, used=used, cotangents=cotangents, moves=moves) if moves and spec.smooth else None
    return Yardstick(ref, base, cotangents, moved)


def movement(spec, sample, ref, *, used=None, cotangents=None, moves=MOVES):
    """How far each element of `ref` moves when every input and cotangent is off by up to one rounding of float32: a root mean square."""
    generator = torch.Generator("cpu").manual_seed(2000)

    def move(value):
        if not isinstance(value, torch.Tensor) or value.dtype not in FLOAT_DTYPES:
            return value
        share = torch.rand(value.shape, generator=generator, dtype=torch.float64, device="cpu").mul_(2).sub_(1).to(value.device)
        exact = value.detach().double()
        return torch.where(exact.isfinite(), exact + exact * share * torch.finfo(torch.float32).eps, exact)

    squares = Run(*({name: torch.zeros_like(x, dtype=torch.float64) for name, x in side.items()} for side in (ref.outputs, ref.grads)))
    for _ in range(moves):
        arguments = {name: move(value) for name, value in spec.bind(sample).items()}
        there = dataclasses.replace(sample, args=(), kwargs=arguments)
        got = run(spec.reference, spec, there, used=used, double=True, cotangents=[move(x) for x in cotangents])
        for sums, exact, found in ((squares.outputs, ref.outputs, got.outputs), (squares.grads, ref.grads, got.grads)):
            for name, x in exact.items():
                sums[name] += (found[name] - x).square() / moves
    return Run(*({name: x.sqrt() for name, x in side.items()} for side in (squares.outputs, squares.grads)))


def pools(spec, dtype, device="cpu", seed=0):
    """The samples of a spec, each as a list of draws: the sample of `seed`, and as many from other seeds as its smallest tensor needs to
    have `POOL` elements (outputs and gradients that are not empty count, without infinities)."""

    def smallest(sample):
        outputs, bound = run(spec.reference, spec, sample, wrt=()).outputs, spec.bind(sample)
        sizes = [int(x.isfinite().sum()) for x in outputs.values()] + [bound[name].numel() for name in sample.differentiable]
        return min((size for size in sizes if size), default=POOL)

    found = [[sample] for sample in spec.samples(dtype, device, seed)]
    counts = [math.ceil(POOL / smallest(draws[0])) for draws in found]
    for number in range(1, max(counts)):
        last = max(i for i, count in enumerate(counts) if count > number)
        for i, sample in enumerate(itertools.islice(spec.samples(dtype, device, seed + 1_000_000 * number), last + 1)):
            if counts[i] > number:
                found[i].append(sample)
    return found


def violations(spec, sample, got, measure):
    """Every way in which the run `got` breaks the rule, as text lines (empty: it holds). Lists of all three are draws, judged as a pool."""
    draws, runs, measures = (x if isinstance(x, list) else [x] for x in (sample, got, measure))
    refs, bases, moves = zip(*((m.ref, m.base, m.moved) for m in measures), strict=True)
    lines = []
    for kind, prefix in (("outputs", ""), ("grads", "grad ")):
        for name in getattr(runs[0], kind):
            out, ref, base, moved = (
                None if None in side else [getattr(part, kind)[name] for part in side] for side in (runs, refs, bases, moves)
            )
            problem = violation(out, ref, base, spec.tolerance(prefix + name, out[0].dtype), moved=moved)
            if problem is not None:
                lines.append(f"{spec.name}[{draws[0].label}] {prefix}{name}: {problem}")
    return lines


def check_sample(spec, sample, *, wrt=None, used=None, measure=None, runs=None):
    """Run the op on a sample under poisoned buffers and hold it to the rule; raises AssertionError with every violation.

    A list of draws (see `pools`), with a list of their yardsticks or none, is judged as a pool.
    runs  on how many of its draws the op runs; None: all
    → the Run, or the list of them
    """
    draws = sample if isinstance(sample, list) else [sample]
    measures = measure or [yardstick(spec, draw, used=used) for draw in draws]
    measures = measures if isinstance(measures, list) else [measures]
    pairs = list(zip(draws, measures, strict=True))
    with poisoned_empty():
        got = [run(spec.op, spec, draw, wrt=wrt, used=used, cotangents=m.cotangents) for draw, m in pairs[:runs]]
    lines = violations(spec, draws, got, measures)
    if lines:
        raise AssertionError("\n".join(lines))
    return got if isinstance(sample, list) else got[0]


def check_samples(spec, samples, choices, *, runs=None):
    """`check_sample` with each of `choices(sample)`, dicts of its keywords; raises one AssertionError with what all of them found.

    samples  samples, or lists of draws; the op runs on the first `runs` of them, None: on all
    """
    problems = []
    for sample in samples:
        draws, measures = sample if isinstance(sample, list) else [sample], {}
        for choice in choices(draws[0]):
            used = choice.get("used")
            if used not in measures:
                measures[used] = [yardstick(spec, draw, used=used) for draw in draws]
            try:
                check_sample(spec, draws, measure=measures[used], runs=runs, **choice)
            except AssertionError as error:
                problems.append(f"{draws[0].label} {choice or ''}\n{error}")
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
