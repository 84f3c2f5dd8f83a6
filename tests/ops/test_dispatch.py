"""A call that nobody listens to skips torch's dispatcher; whoever listens hears it."""

import contextlib

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
def listeners(monkeypatch):
    """Whom each call so far was made for: None, "autograd" or the "dispatcher"."""
    seen, find = [], _common._listener
    monkeypatch.setattr(_common, "_listener", lambda op, tensors: seen.append(find(op, tensors)) or seen[-1])
    return seen


def test_a_plain_call_is_direct_and_gives_the_same_bits(inputs, listeners):
    out, lse = merge_attention(*inputs)
    through, through_lse = torch.ops.longvita.merge_attention(*inputs)
    assert listeners == [None]
    assert torch.equal(out, through) and torch.equal(lse, through_lse)
    assert not out.requires_grad


def test_autograd_alone_is_served_without_the_dispatcher(inputs, listeners):
    inputs[0].requires_grad_()
    out, lse = merge_attention(*inputs)
    assert out.grad_fn.name() == "merge_attentionBackward"
    with torch.no_grad():
        assert not merge_attention(*inputs)[0].requires_grad
    assert listeners == ["autograd", None]
    grad = torch.randn_like(out)
    (direct,) = torch.autograd.grad(out, inputs[0], grad)
    through = torch.ops.longvita.merge_attention(*inputs)[0]
    assert through.grad_fn.name() != out.grad_fn.name()
    assert torch.equal(direct, torch.autograd.grad(through, inputs[0], grad)[0])


def test_a_second_derivative_is_refused_on_both_ways(inputs):
    inputs[0].requires_grad_()
    for function in (merge_attention, torch.ops.longvita.merge_attention):
        (first,) = torch.autograd.grad(function(*inputs)[0].square().sum(), inputs[0], create_graph=True)
        with pytest.raises(RuntimeError, match="has no second derivative"):
            first.sum().backward()


def test_an_unused_gradient_is_not_computed(inputs):
    """needs_input_grad reaches the implementation on the direct way as well."""
    inputs[2].requires_grad_()
    merge_attention(*inputs)[0].sum().backward()
    assert inputs[0].grad is None and inputs[2].grad is not None


def test_forward_mode_is_refused_rather_than_ignored(inputs):
    with forward_ad.dual_level():
        merge_attention(*inputs)
        with pytest.raises(RuntimeError, match="has no forward-mode derivative. Remedy: use reverse mode"):
            merge_attention(forward_ad.make_dual(inputs[0], torch.ones_like(inputs[0])), *inputs[1:])


def test_dispatch_modes_and_fake_tensors_see_the_op(inputs, listeners):
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
    assert listeners == ["dispatcher"] * 2


def test_the_profiler_sees_the_op(inputs, listeners):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        merge_attention(*inputs)
    assert any(event.name == "longvita::merge_attention" for event in profile.events())
    assert listeners == ["dispatcher"]


def test_functional_transforms_are_refused_rather_than_ignored(inputs):
    with pytest.raises(RuntimeError, match="does not work inside torch.func.grad"):
        torch.func.grad(lambda out: merge_attention(out, *inputs[1:])[0].sum())(inputs[0])


def test_subclasses_go_through_the_dispatcher(inputs, listeners):
    class Mine(torch.Tensor):
        pass

    merge_attention(inputs[0].as_subclass(Mine), *inputs[1:])
    assert listeners == ["dispatcher"]


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


class _OnSecondGpu(torch.Tensor):
    device = torch.device("cuda:1")


def test_an_implementation_finds_its_tensors_device_current(monkeypatch):
    events = []

    @contextlib.contextmanager
    def current(device):
        events.append(("enter", device))
        yield
        events.append(("leave", device))

    monkeypatch.setattr(torch.cuda, "device", current)
    launch = _common.on_device(lambda scale, x: events.append("launch"))
    launch(0.5, torch.zeros(1))
    assert events == ["launch"], "on the CPU no device is set"
    launch(0.5, torch.zeros(1).as_subclass(_OnSecondGpu))
    assert events[1:] == [("enter", torch.device("cuda:1")), "launch", ("leave", torch.device("cuda:1"))]
