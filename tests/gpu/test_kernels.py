"""Our kernels on a GPU, every op: the whole accuracy rule in every dtype, repeated runs, CUDA graphs, no synchronisation, compile."""

import functools
import importlib.util

import pytest
import torch

from longvita_kernels import backends, testing
from longvita_kernels.cuda import native_cuda
from longvita_kernels.spec import all_specs

SPECS = list(all_specs().values())
DIFFERENTIABLE = [spec for spec in SPECS if any(sample.differentiable for sample in spec.samples(torch.float32, "cpu", 0))]


def _name(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else getattr(value, "name", None)


def _choices():
    """(spec, dtype, backend): ours for every op, and the other ways where they are."""
    yield from ((spec, dtype, backend) for spec, backend in OURS for dtype in spec.dtypes)
    for spec in SPECS:
        for dtype in spec.dtypes:
            yield spec, dtype, "torch"
            if spec.name in backends.FLASH_OPS and dtype != torch.float32 and importlib.util.find_spec("flash_attn"):
                yield spec, dtype, "flash_attn"


def _ours():
    """(spec, backend): Triton for every op, and CUDA C++ for the ops that it has, where it was built (its attention: test_cuda_cpp.py)."""
    yield from ((spec, "triton") for spec in SPECS)
    if native_cuda.load() is not None:
        yield from ((spec, "cuda") for spec in SPECS if spec.name in backends.CUDA_OPS - {"varlen_attention"})


OURS = list(_ours())
each_of_ours = pytest.mark.parametrize(("spec", "backend"), OURS, ids=_name)
each_choice = pytest.mark.parametrize(("spec", "dtype", "backend"), list(_choices()), ids=_name)
each_spec = pytest.mark.parametrize("spec", SPECS, ids=_name)


@pytest.fixture(autouse=True)
def _no_tf32():
    """float32 means float32, for the composition that bounds the errors as well."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@functools.lru_cache(maxsize=4)
def _samples(name, dtype):
    return list(all_specs()[name].samples(dtype, "cuda", 0))


@each_choice
def test_forward_and_gradients_are_accurate(spec, dtype, backend):
    with backends.use(backend):
        assert backends.choose(spec.name, _samples(spec.name, dtype)[0].args[0]) == backend
        testing.check_samples(spec, _samples(spec.name, dtype), lambda sample: [{}])


@each_choice
def test_frozen_inputs_and_unused_outputs(spec, dtype, backend):
    def choices(sample):
        names = sample.differentiable
        yield {"wrt": ()}
        if names:
            yield from ({"wrt": tuple(n for n in names if n != frozen)} for frozen in names)
            yield from ({"used": (output,)} for output in spec.outputs)

    with backends.use(backend):
        testing.check_samples(spec, _samples(spec.name, dtype), choices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_name)
@each_of_ours
def test_fifty_runs_agree_in_every_bit(spec, backend, dtype):
    with backends.use(backend):
        for sample in _samples(spec.name, dtype):
            first = testing.run(spec.op, spec, sample)
            for _ in range(49):
                again = testing.run(spec.op, spec, sample)
                for name, out in (first.outputs | first.grads).items():
                    testing.assert_bit_equal((again.outputs | again.grads)[name], out, name=f"{sample.label}: {name}")


def _in_place(spec, sample, leaves):
    """A call with fixed inputs: outputs and gradients. append_kv's spec copies its caches, which a graph may do as well."""
    arguments = spec.bind(sample) | leaves
    outputs = spec.op(**arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = ()
    if leaves:
        flowing = [out for out in outputs if out.requires_grad]
        grads = torch.autograd.grad(flowing, list(leaves.values()), [torch.ones_like(out) for out in flowing])
    return [out.detach() for out in outputs] + list(grads)


@each_of_ours
def test_calls_can_be_captured_and_never_synchronise(spec, backend):
    """Forward and backward; a bool mask of rows is the one form that synchronises."""
    with backends.use(backend):
        for sample in _samples(spec.name, torch.bfloat16):
            bound = spec.bind(sample)
            if any(isinstance(value, torch.Tensor) and value.dtype == torch.bool for value in bound.values()):
                continue
            leaves = {name: bound[name].detach().requires_grad_() for name in sample.differentiable}
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                expected = [_in_place(spec, sample, leaves) for _ in range(2)][1]  # kernels are compiled before the capture
                torch.cuda.set_sync_debug_mode("error")
                try:
                    _in_place(spec, sample, leaves)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                captured = _in_place(spec, sample, leaves)
            for _ in range(2):
                graph.replay()
            torch.cuda.synchronize()
            for got, want in zip(captured, expected, strict=True):
                testing.assert_bit_equal(got, want, name=f"{spec.name}[{sample.label}]")


@each_of_ours
def test_compiles_without_a_graph_break(spec, backend):
    with backends.use(backend):
        sample = _samples(spec.name, torch.bfloat16)[0]
        torch._dynamo.reset()
        eager = testing.run(spec.op, spec, sample)
        compiled = testing.run(torch.compile(spec.op, fullgraph=True, backend="aot_eager"), spec, sample)
        for name, out in (eager.outputs | eager.grads).items():
            testing.assert_bit_equal((compiled.outputs | compiled.grads)[name], out, name=name)


@each_spec
def test_a_default_is_verified_or_inside_torch(spec):
    sample = _samples(spec.name, torch.bfloat16)[0]
    said = backends.explain(spec.name, *sample.args, **sample.kwargs)
    assert "see bench/results/" in said or "no kernel is verified on sm_" in said
    with backends.use("triton"):
        said = backends.explain(spec.name, *sample.args, **sample.kwargs)
    assert said.startswith(f"{spec.name}: triton (requested; ") and "verified on sm_" in said
