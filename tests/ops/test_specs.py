"""Everything an OpSpec promises, for every op: accuracy of outputs and gradients by the rule of `longvita_kernels.testing` under poisoned
buffers, opcheck, gradcheck of the definition, compile, determinism, autocast, second derivatives.

Samples are small; the axes they cover (empty documents, group sizes, strides, …) are chosen in each op's module. They are drawn from the
seed that `--sample-seed` names; `make seeds` runs these tests with ten others.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import longvita_kernels
from longvita_kernels import backends, native, testing
from longvita_kernels.spec import all_specs

SPECS = list(all_specs().values())
DIFFERENTIABLE = [spec for spec in SPECS if any(sample.differentiable for sample in spec.samples(torch.float32, "cpu", 0))]


def _name(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else getattr(value, "name", None)


each_spec = pytest.mark.parametrize("spec", SPECS, ids=_name)
each_differentiable_spec = pytest.mark.parametrize("spec", DIFFERENTIABLE, ids=_name)
each_spec_and_dtype = pytest.mark.parametrize(("spec", "dtype"), [(s, d) for s in SPECS for d in s.dtypes], ids=_name)
each_differentiable_spec_and_dtype = pytest.mark.parametrize(
    ("spec", "dtype"), [(s, d) for s in DIFFERENTIABLE for d in s.dtypes], ids=_name
)


@pytest.fixture(params=("native", "reference"))
def backend(request):
    """Run the test once per backend; a backend that is not there fails the test and says why."""
    backends.use(request.param)
    return request.param


@functools.lru_cache(maxsize=4)
def _pools(name, dtype, seed):
    return testing.pools(all_specs()[name], dtype, "cpu", seed)


@pytest.fixture
def samples(sample_seed):
    """samples(spec, dtype): the samples of a spec, drawn from the seed of this run."""
    return lambda spec, dtype: [draws[0] for draws in _pools(spec.name, dtype, sample_seed)]


@functools.lru_cache(maxsize=1024)
def _yardstick(name, dtype, seed, index, draw=0, used=None):
    return testing.yardstick(all_specs()[name], _pools(name, dtype, seed)[index][draw], used=used)


@pytest.fixture
def check(sample_seed):
    """check(spec, dtype, choices): `check_sample` for every sample and each {"wrt": …, "used": …} of `choices(sample)`, where the op runs
    on the first draw; without choices once, where it runs on the whole pool. Fails with all violations at once."""

    def run(spec, dtype, choices=None):
        problems = []
        for index, draws in enumerate(_pools(spec.name, dtype, sample_seed)):
            for choice in choices(draws[0]) if choices else [{}]:
                key = spec.name, dtype, sample_seed, index
                measures = [_yardstick(*key, draw, choice.get("used")) for draw in range(len(draws))]
                try:
                    testing.check_sample(spec, draws, measure=measures, runs=1 if choices else None, **choice)
                except AssertionError as error:
                    problems.append(f"{choice or ''}\n{error}")
        assert not problems, "\n".join(problems)

    return run


# ------------------------------------------------------------------------------------------------------------------------------ accuracy


@each_spec_and_dtype
def test_forward_and_gradients_are_accurate(check, spec, dtype, backend):
    check(spec, dtype)


@each_spec_and_dtype
def test_the_torch_backend_is_accurate(check, spec, dtype):
    """All at once, as it is a GPU's default: every gradient, forward alone, each input frozen in turn, each output alone."""
    backends.use("torch")
    check(spec, dtype)

    def choices(sample):
        names = sample.differentiable
        yield from [{"wrt": ()}] if names else []
        yield from ({"wrt": tuple(n for n in names if n != frozen)} for frozen in names if len(names) > 1)
        yield from ({"used": (name,)} for name in spec.outputs if names and len(spec.outputs) > 1)

    check(spec, dtype, choices)


@each_differentiable_spec_and_dtype
def test_forward_alone_is_accurate(check, spec, dtype, backend):
    check(spec, dtype, lambda sample: [{"wrt": ()}])


@each_differentiable_spec_and_dtype
def test_each_input_frozen_in_turn(check, spec, dtype, backend):
    def all_but_one(sample):
        names = sample.differentiable
        return [{"wrt": tuple(n for n in names if n != frozen)} for frozen in names] if len(names) > 1 else []

    check(spec, dtype, all_but_one)


@pytest.mark.parametrize("spec", [spec for spec in DIFFERENTIABLE if len(spec.outputs) > 1], ids=_name)
def test_unused_outputs(check, spec, backend):
    check(spec, torch.float32, lambda sample: [{"used": (name,)} for name in spec.outputs])


@each_spec_and_dtype
def test_the_rule_has_teeth(sample_seed, spec, dtype):
    """Zeros, 5 % off and a swapped row must be rejected for every output and gradient of every sample, judged as a pool."""
    seen, names = {}, set()
    for index, draws in enumerate(_pools(spec.name, dtype, sample_seed)):
        measures = [_yardstick(spec.name, dtype, sample_seed, index, draw) for draw in range(len(draws))]
        runs = [testing.run(spec.op, spec, draw, cotangents=m.cotangents) for draw, m in zip(draws, measures, strict=True)]
        for kind, prefix in (("outputs", ""), ("grads", "grad ")):
            for name in getattr(runs[0], kind):
                names.add(prefix + name)
                right = [getattr(got, kind)[name] for got in runs]
                spoiled = [testing.spoiled(x) for x in right]
                for what in set().union(*spoiled):
                    wrong = [found.get(what, x).to(x.dtype) for found, x in zip(spoiled, right, strict=True)]
                    wrong = [testing.Run(**{"outputs": {}, "grads": {}, kind: {name: x}}) for x in wrong]
                    lines = testing.violations(spec, draws, wrong, measures)
                    assert lines, f"{spec.name}[{draws[0].label}] {prefix}{name}: {what} passes for right"
                    seen.setdefault(prefix + name, set()).add(what)
    assert all(seen.get(name, set()) >= {"zeros", "5 % off"} for name in names), f"{spec.name}: only zeros in {names - set(seen)}"


@each_differentiable_spec
def test_gradcheck_of_the_definition(spec):
    checked = 0
    for sample in spec.samples(torch.float64, "cpu", 0):
        arguments = spec.bind(sample)
        leaves = [arguments[name].detach().clone().requires_grad_() for name in sample.differentiable]
        if sum(leaf.numel() for leaf in leaves) == 0:
            continue

        def finite_outputs(*values, arguments=arguments, names=sample.differentiable):
            outputs = spec.reference(**{**arguments, **dict(zip(names, values, strict=True))})
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            return tuple(torch.where(o.isfinite(), o, 0.0) for o in outputs if o.is_floating_point() and o.requires_grad)

        assert torch.autograd.gradcheck(finite_outputs, leaves, fast_mode=True, atol=1e-6, rtol=1e-4), sample.label
        checked += 1
    assert checked > 0


# ------------------------------------------------------------------------------------------------------------------- torch.library, compile


def _opcheck_arguments(args, sample, spec, *, gradients):
    """Arguments opcheck can take: empty views copied (it cannot copy them itself); with `gradients`, requires_grad as in the spec."""
    bound = spec.bind(sample)
    pointers = {bound[name].data_ptr() for name in sample.differentiable if bound[name].numel()} if gradients else ()
    for arg in args:
        if isinstance(arg, torch.Tensor) and arg.numel() == 0:
            arg = torch.empty(arg.shape, dtype=arg.dtype)
        elif isinstance(arg, torch.Tensor) and arg.is_floating_point() and arg.data_ptr() in pointers:
            arg = arg.detach().requires_grad_()
        yield arg


def _pattern(op, args):
    """What makes one opcheck differ from another: the op, and of each argument its dtype, emptiness and density, or that it is absent."""
    kinds = [(a.dtype, a.numel() == 0, a.is_contiguous()) if isinstance(a, torch.Tensor) else a is None for a in args]
    return op.name(), tuple(kinds)


with_torch = pytest.mark.parametrize("backend", ["native", "torch", "reference"], indirect=True)


@with_torch
@each_spec
def test_opcheck(samples, spec, backend):
    samples = samples(spec, torch.float32)
    seen = set()
    for sample in samples if backend == "native" else samples[:1]:
        for op, args in spec.flat_calls(sample):
            if _pattern(op, args) in seen:
                continue
            seen.add(_pattern(op, args))
            torch.library.opcheck(op, tuple(_opcheck_arguments(args, sample, spec, gradients=op.name() == f"longvita::{spec.name}")))
    assert seen and all(name.startswith(f"longvita::{spec.name}") for name, _ in seen)


@each_spec
def test_compiles_without_a_graph_break(samples, spec):
    sample = samples(spec, torch.float32)[0]
    torch._dynamo.reset()
    eager = testing.run(spec.op, spec, sample)
    compiled = testing.run(torch.compile(spec.op, fullgraph=True, backend="aot_eager"), spec, sample)
    for name, out in eager.outputs.items():
        testing.assert_bit_equal(compiled.outputs[name], out, name=name)
    for name, grad in eager.grads.items():
        testing.assert_bit_equal(compiled.grads[name], grad, name=f"grad {name}")


@each_differentiable_spec
def test_gradients_of_the_sum_of_nothing(samples, spec, backend):
    """A sum's gradient is expanded, with strides 0, and `contiguous()` leaves an empty tensor as it is."""
    empty = [s for s in samples(spec, torch.float32) if any(spec.bind(s)[n].numel() == 0 for n in s.differentiable)]
    assert empty, "no sample is empty"
    for sample in empty:
        arguments = spec.bind(sample)
        leaves = [arguments[name].detach().requires_grad_() for name in sample.differentiable]
        outputs = spec.op(**{**arguments, **dict(zip(sample.differentiable, leaves, strict=True))})
        sum(out.sum() for out in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
        assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves), sample.label


@each_differentiable_spec
def test_second_derivative_is_refused(samples, spec):
    sample = samples(spec, torch.float32)[0]
    arguments = spec.bind(sample)
    leaf = arguments[sample.differentiable[0]] = arguments[sample.differentiable[0]].detach().requires_grad_()
    outputs = spec.op(**arguments)
    out = outputs[0] if isinstance(outputs, tuple) else outputs
    (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


# ---------------------------------------------------------------------------------------------------------------------------- determinism


@each_spec_and_dtype
def test_bits_do_not_depend_on_threads_or_run(samples, spec, dtype):
    for sample in samples(spec, dtype):
        torch.set_num_threads(1)
        first = testing.run(spec.op, spec, sample)
        for threads in (1, 1, 2, 4, 4):
            torch.set_num_threads(threads)
            again = testing.run(spec.op, spec, sample)
            for name, out in first.outputs.items():
                testing.assert_bit_equal(again.outputs[name], out, name=f"{sample.label}, {threads} threads: {name}")
            for name, grad in first.grads.items():
                testing.assert_bit_equal(again.grads[name], grad, name=f"{sample.label}, {threads} threads: grad {name}")


# ------------------------------------------------------------------------------------------------------------------------------- autocast


@with_torch
@each_spec
def test_autocast_casts_what_the_spec_says(samples, spec, backend):
    sample = samples(spec, torch.float32)[0]
    arguments = spec.bind(sample)

    def cast(**values):
        return spec.op(**{n: v.to(torch.bfloat16) if n in spec.autocast and v is not None else v for n, v in values.items()})

    wanted = testing.run(cast, spec, sample)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = testing.run(spec.op, spec, sample)
    for name, out in wanted.outputs.items():
        testing.assert_bit_equal(got.outputs[name], out, name=name)
    for name, grad in wanted.grads.items():
        assert got.grads[name].dtype == arguments[name].dtype
        testing.assert_bit_equal(got.grads[name], grad, name=f"grad {name}")


# ------------------------------------------------------------------------------------------------------------------------------ the specs


def test_every_public_op_has_a_spec():
    assert set(all_specs()) == set(longvita_kernels.__all__) - {"plan_context_parallel", "ring_attention"}  # tests/ring has these


@each_spec
def test_bytes_and_flops_are_counted(samples, spec):
    for sample in samples(spec, torch.float32):
        assert isinstance(spec.bytes(sample), int) and isinstance(spec.flops(sample), int)
        assert spec.bytes(sample) >= 0 and spec.flops(sample) >= 0
    assert spec.bytes(samples(spec, torch.float32)[0]) > 0


@each_spec
def test_samples_are_reproducible_and_labelled(spec):
    first, second = (list(spec.samples(torch.float32, "cpu", 3)) for _ in range(2))
    assert len({sample.label for sample in first}) == len(first)
    for a, b in zip(first, second, strict=True):
        for name, value in spec.bind(a).items():
            if isinstance(value, torch.Tensor):
                testing.assert_bit_equal(value, spec.bind(b)[name], name=f"{a.label}: {name}")


# ------------------------------------------------------------------------------------------------------------------ other instruction sets


_CHILD = """
import sys, pytest, torch
from longvita_kernels import native
expected, *arguments = sys.argv[1:]
got = {"LONGVITA_ISA": native.isa(), "ATEN_CPU_CAPABILITY": torch.backends.cpu.get_cpu_capability().lower()}
name, value = expected.split("=")
assert got[name] == value, f"expected {expected}, runs on {got[name]}"
sys.exit(pytest.main(arguments))
"""
KERNELS = sorted(name for name, runs in native.built_isas().items() if runs) if native.load() else []
# What torch itself runs on decides by how much `base` errs. The machine's own capability is that of every other test.
OWN = torch.backends.cpu.get_cpu_capability().lower()
TORCH = {"avx512": ["default", "avx2"], "avx2": ["default"]}.get(OWN, [])


def _run_on(variable, value, selection, seed):
    environment = {**os.environ, variable: value, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _CHILD, f"{variable}={value}", "-q", "-x", "-p", "no:cacheprovider", f"--sample-seed={seed}"]
    command += ["-k", selection, __file__]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, f"{variable}={value}: {done.stdout[-6000:]}{done.stderr[-2000:]}"
    assert " passed" in done.stdout


@pytest.mark.timeout(1800)
def test_portable_instruction_set_is_accurate(sample_seed):
    _run_on("LONGVITA_ISA", "portable", "forward_and_gradients and native", sample_seed)


@pytest.mark.isa
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("isa", KERNELS)
def test_every_instruction_set(sample_seed, isa):
    """Accuracy, frozen inputs, unused outputs and determinism on each instruction set of the kernels that this machine can run."""
    _run_on("LONGVITA_ISA", isa, "((gradients or forward_alone or frozen or unused) and native) or bits_do_not", sample_seed)


@pytest.mark.isa
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("capability", TORCH)
def test_every_instruction_set_of_torch(sample_seed, capability):
    """Accuracy of every backend, and the teeth of the rule, where torch itself, and with it `base`, uses fewer instructions."""
    _run_on("ATEN_CPU_CAPABILITY", capability, "gradients or torch_backend or forward_alone or frozen or unused or teeth", sample_seed)
