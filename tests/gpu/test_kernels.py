"""Our kernels on a GPU, every op: the whole accuracy rule in every dtype, repeated runs, CUDA graphs, no synchronisation, compile."""

import functools
import importlib.util

import pytest
import torch

from longvita_kernels import backends, testing
from longvita_kernels.cuda import native_cuda
from longvita_kernels.spec import all_specs
from tests.gpu.support import name

SPECS = list(all_specs().values())
# What torch alone can do without reading anything back.
INSIDE_TORCH = ("append_kv", "decode_attention", "masked_lm_head", "merge_attention", "pixel_shuffle_projection")


def _ours():
    """(spec, backend): Triton for every op, and CUDA C++ for the ops that it has, where it was built (its attention: test_cuda_cpp.py)."""
    yield from ((spec, "triton") for spec in SPECS)
    if native_cuda.load() is not None:
        yield from ((spec, "cuda") for spec in SPECS if spec.name in backends.CUDA_OPS - {"varlen_attention"})


def _others():
    yield from ((spec, "torch") for spec in SPECS)
    if importlib.util.find_spec("flash_attn"):
        yield from ((spec, "flash_attn") for spec in SPECS if spec.name in backends.FLASH_OPS)


@functools.lru_cache(maxsize=4)
def _pools(op, dtype):
    return testing.pools(all_specs()[op], dtype, "cuda")


def _each_sample(choices, dtypes):
    """A test for each sample of each (spec, backend): its arguments `spec`, `backend` and `draws`, a function that makes its pool."""
    found = []
    for spec, backend in choices:
        for dtype in spec.dtypes:
            if dtype in dtypes and not (backend == "flash_attn" and dtype == torch.float32):
                for i, sample in enumerate(spec.samples(dtype, "cpu", 0)):
                    make = functools.partial(lambda op, dtype, i: _pools(op, dtype)[i], spec.name, dtype, i)
                    found.append(pytest.param(spec, backend, make, id=f"{spec.name}-{backend}-{name(dtype)}-{sample.label}"))
    if not torch.cuda.is_available():
        found = found[:1]  # one that is skipped stands for all
    return pytest.mark.parametrize(("spec", "backend", "draws"), found)


OURS, ALL = list(_ours()), (torch.float32, torch.bfloat16, torch.float16)
each_choice = _each_sample([*OURS, *_others()], ALL)
each_of_ours = pytest.mark.parametrize(("spec", "backend"), OURS, ids=name)


@each_choice
def test_forward_and_gradients_are_accurate(spec, backend, draws):
    draws = draws()
    assert backends.choose(spec.name, draws[0].args[0]) == backend
    testing.check_sample(spec, draws)


@each_choice
def test_frozen_inputs_and_unused_outputs(spec, backend, draws):
    def choices(sample):
        names = sample.differentiable
        yield {"wrt": ()}
        if names:
            yield from ({"wrt": tuple(n for n in names if n != frozen)} for frozen in names)
            yield from ({"used": (output,)} for output in spec.outputs)

    testing.check_samples(spec, [draws()], choices, runs=1)


@_each_sample(OURS, (torch.float32, torch.bfloat16))
def test_fifty_runs_agree_in_every_bit(spec, backend, draws):
    sample = draws()[0]
    first = testing.run(spec.op, spec, sample)
    for _ in range(49):
        again = testing.run(spec.op, spec, sample)
        for output, out in (first.outputs | first.grads).items():
            testing.assert_bit_equal((again.outputs | again.grads)[output], out, name=output)


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


@_each_sample([*OURS, *((spec, "torch") for spec in SPECS if spec.name in INSIDE_TORCH)], (torch.bfloat16,))
def test_calls_can_be_captured_and_never_synchronise(spec, backend, draws):
    """Forward and backward; a bool mask of rows is the one form that synchronises."""
    sample = draws()[0]
    bound = spec.bind(sample)
    if any(isinstance(value, torch.Tensor) and value.dtype == torch.bool for value in bound.values()):
        return
    leaves = {parameter: bound[parameter].detach().requires_grad_() for parameter in sample.differentiable}
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
        testing.assert_bit_equal(got, want)


@each_of_ours
def test_compiles_without_a_graph_break(spec, backend):
    sample = _pools(spec.name, torch.bfloat16)[0][0]
    torch._dynamo.reset()
    eager = testing.run(spec.op, spec, sample)
    compiled = testing.run(torch.compile(spec.op, fullgraph=True, backend="aot_eager"), spec, sample)
    for output, out in (eager.outputs | eager.grads).items():
        testing.assert_bit_equal((compiled.outputs | compiled.grads)[output], out, name=output)


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_a_default_is_verified_or_inside_torch(spec):
    sample = _pools(spec.name, torch.bfloat16)[0][0]
    said = backends.explain(spec.name, *sample.args, **sample.kwargs)
    assert "see bench/results/" in said or "no kernel is verified on sm_" in said
    with backends.use("triton"):
        said = backends.explain(spec.name, *sample.args, **sample.kwargs)
    assert said.startswith(f"{spec.name}: triton (requested; ") and "verified on sm_" in said
