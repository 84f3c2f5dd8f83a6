"""A call that nobody listens to skips torch's dispatcher; whoever listens hears it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import longvita_kernels
from longvita_kernels import merge_attention
from longvita_kernels import spec as spec_module
from longvita_kernels.ops import _common


@pytest.fixture
def inputs():
    return torch.randn(3, 2, 32), torch.randn(2, 3), torch.randn(3, 2, 32), torch.randn(2, 3)


@pytest.fixture
def direct(monkeypatch):
    """Whether each call so far went past the dispatcher."""
    seen, decide = [], _common._nobody_listens
    monkeypatch.setattr(_common, "_nobody_listens", lambda tensors: seen.append(decide(tensors)) or seen[-1])
    return seen


def test_a_plain_call_is_direct_and_gives_the_same_bits(inputs, direct):
    out, lse = merge_attention(*inputs)
    through, through_lse = torch.ops.longvita.merge_attention(*inputs)
    assert direct == [True]
    assert torch.equal(out, through) and torch.equal(lse, through_lse)
    assert not out.requires_grad


def test_gradients_go_through_the_dispatcher_unless_they_are_off(inputs, direct):
    inputs[0].requires_grad_()
    assert merge_attention(*inputs)[0].requires_grad
    with torch.no_grad():
        assert not merge_attention(*inputs)[0].requires_grad
    assert direct == [False, True]


def test_forward_mode_is_refused_rather_than_ignored(inputs):
    with forward_ad.dual_level():
        merge_attention(*inputs)
        with pytest.raises(RuntimeError, match="has no forward-mode derivative. Remedy: use reverse mode"):
            merge_attention(forward_ad.make_dual(inputs[0], torch.ones_like(inputs[0])), *inputs[1:])


def test_dispatch_modes_and_fake_tensors_see_the_op(inputs, direct):
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names = [*getattr(self, "names", []), str(function)]
            return function(*args, **(kwargs or {}))

    with Names() as mode:
        merge_attention(*inputs)
    assert "longvita.merge_attention.default" in mode.names
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in inputs]
        assert type(merge_attention(*fake)[0]) is type(fake[0])
    assert direct == [False, False]


def test_the_profiler_sees_the_op(inputs, direct):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        merge_attention(*inputs)
    assert any(event.name == "longvita::merge_attention" for event in profile.events())
    assert direct == [False]


def test_functional_transforms_are_refused_rather_than_ignored(inputs, direct):
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda out: merge_attention(out, *inputs[1:])[0].sum())(inputs[0])
    assert direct == [False]


def test_subclasses_go_through_the_dispatcher(inputs, direct):
    class Mine(torch.Tensor):
        pass

    merge_attention(inputs[0].as_subclass(Mine), *inputs[1:])
    assert direct == [False]


def test_the_short_checks_accept_only_what_the_long_ones_do(monkeypatch):
    """Every sample that the short way lets pass must pass the long way too."""
    short = 0
    for op, spec in spec_module.all_specs().items():
        for sample in spec.samples(torch.float32, "cpu", 0):
            with monkeypatch.context() as patch:
                asked = []
                patch.setattr(_common, "common_case", lambda *tensors, asked=asked: asked.append(tensors) or False)
                with torch.no_grad():
                    getattr(longvita_kernels, op)(*sample.args, **sample.kwargs)
                short += len(asked)
    assert short > 30


def test_direct_calls_that_return_less_give_the_same_bits():
    for op, name in (("varlen_attention", "return_lse"), ("decode_attention", "return_lse")):
        spec = spec_module.all_specs()[op]
        for sample in spec.samples(torch.bfloat16, "cpu", 0):
            function = getattr(longvita_kernels, op)
            with_lse = function(*sample.args, **sample.kwargs)[0]
            assert torch.equal(function(*sample.args, **{**sample.kwargs, name: False}), with_lse), sample.label
