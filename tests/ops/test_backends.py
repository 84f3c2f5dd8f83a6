"""Choosing a backend: by request, by environment, by what is there; and that importing the package is cheap."""

import os
import subprocess
import sys

import pytest
import torch

import longvita_kernels
from longvita_kernels import backends, native, spec


def _merge_arguments(dtype=torch.float32):
    return torch.ones(3, 2, 32, dtype=dtype), torch.zeros(2, 3), torch.ones(3, 2, 32, dtype=dtype), torch.zeros(2, 3)


def _python(code, **environment):
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=500)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def without_native(monkeypatch):
    """As on a machine where the native library was never built."""
    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(native, "why_missing", lambda: "it was not built (test)")
    caches = (backends._native_lacks, backends._warn_once)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_native_is_chosen_when_it_is_there():
    assert set(backends.available()) >= {"native", "torch", "reference"} and backends.available()[0] == "native"
    assert backends.choose("merge_attention", torch.ones(1)) == "native"
    explained = backends.explain("merge_attention", *_merge_arguments())
    assert explained == "merge_attention: native (the best for device 'cpu' and torch.float32)"


def test_use_is_a_setter_and_a_context_manager():
    with backends.use("reference"):
        assert backends.choose("merge_attention", torch.ones(1)) == "reference"
        with backends.use("native"):
            assert backends.explain("merge_attention", torch.ones(1)) == "merge_attention: native (requested)"
        assert backends.explain("merge_attention", torch.ones(1)) == "merge_attention: reference (requested)"
    assert backends.requested() is None
    backends.use("reference")
    assert backends.requested() == "reference"
    backends.use("auto")
    assert backends.requested() is None


def test_a_failed_request_changes_nothing(without_native):
    with backends.use("reference"):
        with pytest.raises(RuntimeError, match=r"'native' was requested but cannot be used: it was not built \(test\)"):
            backends.use("native")
        assert backends.requested() == "reference"


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown backend 'cuda13'; expected one of native, cuda, triton, flash_attn, torch, reference"):
        backends.use("cuda13")


def test_a_request_that_a_call_cannot_meet_raises():
    with backends.use("native"):
        with pytest.raises(RuntimeError, match=r"cannot run merge_attention: the native kernel takes float32, bfloat16 and float16"):
            backends.choose("merge_attention", torch.ones(1, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="no such shape"):
            backends.choose("merge_attention", torch.ones(1), unsupported="no such shape")
        with pytest.raises(RuntimeError, match="there is no kernel for device 'meta'"):
            backends.choose("merge_attention", torch.ones(1, device="meta"))
        with pytest.raises(RuntimeError, match="built without no_such_op; build it again"):
            backends.choose("no_such_op", torch.ones(1))


def test_float64_goes_to_the_reference_without_a_warning(recwarn):
    assert backends.choose("merge_attention", torch.ones(1, dtype=torch.float64)) == "reference"
    assert not recwarn.list


def test_a_missing_library_gives_the_reference_and_one_warning(without_native):
    assert "native" not in backends.available() and backends.available()[-1] == "reference"
    with pytest.warns(RuntimeWarning, match=r"merge_attention on the plain torch reference: .*it was not built \(test\)") as warned:
        for _ in range(3):
            out, lse = longvita_kernels.merge_attention(*_merge_arguments())
    assert len(warned) == 1
    torch.testing.assert_close(out, torch.ones(3, 2, 32))
    assert "reference (the native library is missing" in backends.explain("merge_attention", out)


def test_a_call_the_native_kernel_cannot_take_warns_once_and_is_explained():
    backends._warn_once.cache_clear()
    q, offsets = torch.randn(4, 1, 32), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.warns(RuntimeWarning, match="runs varlen_attention on the plain torch reference: .*positive softmax_scale") as warned:
        for scale in (-0.5, 0.0, -0.25):  # another value is not another warning
            longvita_kernels.varlen_attention(q, q, q, offsets, softmax_scale=scale)
    assert len(warned) == 1
    reason = "varlen_attention: reference (the kernels take a positive softmax_scale only)"
    assert backends.explain("varlen_attention", q, q, q, offsets, softmax_scale=-0.5) == reason
    assert backends.explain("varlen_attention", q, q, q, offsets).startswith("varlen_attention: native")
    wide = backends.explain("pixel_shuffle_projection", torch.empty(1, 4, 16385))
    assert wide == "pixel_shuffle_projection: reference (the native kernel takes 1 to 16384 channels only)"
    cache = torch.zeros(1, 4, 1, 32, dtype=torch.float64)
    for op in ("decode_attention", "append_kv"):
        assert "no float64 cache" in backends.explain(op, q, k_cache=cache)


class _OnGpu:
    """What a choice looks at in a tensor on a GPU."""

    device, is_cpu = torch.device("cuda", 0), False

    def __init__(self, dtype=torch.bfloat16):
        self.dtype = dtype


@pytest.fixture
def h100(monkeypatch):
    """A machine with an H100 and everything installed."""
    monkeypatch.setattr(backends, "architecture", lambda device: "sm_90" if device.type == "cuda" else device.type)
    monkeypatch.setattr(backends, "_not_installed", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "VERIFIED", {})
    backends._warn_once.cache_clear()
    return backends.VERIFIED


def test_a_kernel_that_never_ran_on_hardware_is_no_default(h100):
    with pytest.warns(
        RuntimeWarning, match=r"varlen_attention on torch's own kernels and products: no kernel is verified on sm_90"
    ) as warned:
        assert [backends.choose("varlen_attention", _OnGpu()) for _ in range(3)] == ["torch"] * 3
    assert len(warned) == 1
    with pytest.warns(RuntimeWarning, match="merge_attention on torch's own kernels and products: no kernel is verified on sm_90"):
        assert backends.choose("merge_attention", _OnGpu()) == "torch"
    with backends.use("triton"):
        assert backends.choose("varlen_attention", _OnGpu()) == "triton"
        assert backends._decide("varlen_attention", _OnGpu(), None)[1] == "requested; not verified on sm_90"


def test_among_verified_backends_the_fastest_that_can_is_chosen(h100, recwarn):
    flash, ours = (backends.Verified(name, f"bench/results/{name}.json") for name in ("flash_attn", "triton"))
    h100["varlen_attention", "sm_90"] = (flash, ours)
    h100["merge_attention", "sm_100"] = (ours,)
    assert backends._decide("varlen_attention", _OnGpu(), None)[:2] == (
        "flash_attn", "the fastest verified on sm_90, see bench/results/flash_attn.json",
    )  # fmt: skip
    assert backends.choose("varlen_attention", _OnGpu(torch.float32)) == "triton"  # flash-attn has no float32
    assert backends.choose("varlen_attention", _OnGpu(torch.float64)) == "reference"
    assert not recwarn.list
    with backends.use("triton"):
        assert backends._decide("varlen_attention", _OnGpu(), None)[1] == "requested; verified on sm_90, see bench/results/triton.json"
    with pytest.warns(RuntimeWarning, match="no kernel is verified on sm_90"):  # another architecture's result says nothing
        assert backends.choose("merge_attention", _OnGpu()) == "torch"


def test_a_request_concerns_the_ops_that_a_backend_has(h100):
    h100["merge_attention", "sm_90"] = (backends.Verified("triton", "bench/results/x.json"),)
    with backends.use("flash_attn"):
        assert backends.choose("varlen_attention", _OnGpu()) == "flash_attn"
        assert backends.choose("merge_attention", _OnGpu()) == "triton"
        with pytest.raises(
            RuntimeError, match="cannot run varlen_attention: the flash_attn kernel takes bfloat16 and float16, not torch.float32"
        ):
            backends.choose("varlen_attention", _OnGpu(torch.float32))
    with backends.use("triton"), pytest.raises(RuntimeError, match="triton runs on CUDA tensors, not on device 'cpu'"):
        backends.choose("merge_attention", torch.ones(1))


def test_what_is_not_there_cannot_be_requested(monkeypatch):
    monkeypatch.setattr(backends, "_not_installed", lambda name: f"the package {name} is not installed; pip install it")
    for name in ("triton", "flash_attn"):
        assert name not in backends.available()
        with pytest.raises(RuntimeError, match=f"'{name}' was requested but cannot be used: the package {name} is not installed"):
            backends.use(name)
    monkeypatch.setattr(backends, "_not_installed", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="there is no CUDA device"):
        backends.use("triton")


def test_explain_needs_a_tensor():
    with pytest.raises(ValueError, match="needs the call's tensors"):
        backends.explain("merge_attention", 3)


def test_the_environment_is_a_request():
    show = "import torch; from longvita_kernels import backends; print(backends.explain('merge_attention', torch.ones(1)))"
    assert _python(show, LONGVITA_BACKEND="reference") == (0, "merge_attention: reference (requested)\n")
    code, text = _python(show, LONGVITA_BACKEND="nonsense")
    assert code == 1 and "unknown backend 'nonsense'" in text


def test_importing_the_package_loads_nothing():
    code = "import sys, longvita_kernels; dir(longvita_kernels); print([m for m in ('torch', 'numpy', 'triton') if m in sys.modules])"
    assert _python(code) == (0, "[]\n")


def test_every_public_name_is_a_function_of_its_own_module():
    for name in longvita_kernels.__all__:
        function = getattr(longvita_kernels, name)
        place = longvita_kernels._PLACES.get(name, f"ops.{name}")
        assert function.__module__ == f"longvita_kernels.{place}" and function.__doc__
    assert {*longvita_kernels.__all__, "ContextParallelPlan"} <= set(dir(longvita_kernels))
    assert type(longvita_kernels.plan_context_parallel([0, 1], 1)) is longvita_kernels.ContextParallelPlan
    with pytest.raises(AttributeError, match="no attribute 'flash_attention'; it has append_kv"):
        longvita_kernels.flash_attention  # noqa: B018


def test_all_backends_give_the_same_answer():
    for name, op_spec in spec.all_specs().items():
        sample = next(iter(op_spec.samples(torch.float32, "cpu", 1)))
        results = []
        for backend in ("native", "torch", "reference"):
            with backends.use(backend):
                out = op_spec.op(*sample.args, **sample.kwargs)
            results.append(out if isinstance(out, tuple) else (out,))
        for a, *others in zip(*results, strict=True):
            for b in others:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=False, msg=lambda text, name=name: f"{name}: {text}")
