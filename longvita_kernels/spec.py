"""What an op promises, as data: `OpSpec`. Tests, opcheck and benchmarks start from it.

Every op module ends with `SPEC = OpSpec(...)`; `all_specs()` finds them.
"""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class SampleInput:
    """One call `op(*args, **kwargs)`. `differentiable` names the parameters that take a gradient; `label` names the sample in a test id."""

    label: str
    args: tuple
    kwargs: dict = field(default_factory=dict)
    differentiable: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tolerance:
    """A looser rule for one tensor, with the reason for it. The default rule is Tolerance() (see `testing.assert_accurate`)."""

    max_factor: float = 2.0
    norm_factor: float = 1.5
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    """The contract of one op.

    name        the public function's name
    op          the public function; for an op that writes in place, a small function that copies, calls it and returns what was written
    reference   the definition: same signature, plain differentiable torch, float32 inside (float64 for float64)
    base        the plain torch composition in the inputs' own dtype whose error bounds ours; same signature
    samples     samples(dtype, device, seed) → SampleInput, small, covering the axes of the accuracy tests
    outputs     names of the outputs, in order (LSE included: samples ask for it)
    smooth      whether small changes of the inputs change the outputs little; False for an op that rounds to codes, where the accuracy rule
                allows for no movement of the definition (see `testing.movement`)
    autocast    parameters that autocast casts to its dtype, as `linear` and SDPA do; () for an op that leaves dtypes alone
    tolerances  {(output name or "grad <parameter>", dtype or None for all): Tolerance}; each with its reason
    bytes       bytes(sample): what must move at least, each input read once and each output written once
    flops       flops(sample): multiplications and additions that the definition needs
    flat_calls  flat_calls(sample) → (OpOverload, args): every flat custom op under the function with arguments for opcheck
    """

    name: str
    op: Callable
    reference: Callable
    base: Callable
    samples: Callable[[torch.dtype, str, int], Iterator[SampleInput]]
    outputs: tuple[str, ...]
    bytes: Callable[[SampleInput], int]
    flops: Callable[[SampleInput], int]
    flat_calls: Callable[[SampleInput], Iterator[tuple]]
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
    smooth: bool = True
    autocast: tuple[str, ...] = ()
    tolerances: dict = field(default_factory=dict)

    def __post_init__(self):
        for key, tolerance in self.tolerances.items():
            if not tolerance.reason:
                raise ValueError(f"{self.name}: the tolerance for {key} is looser than the rule and gives no reason; say why it has to be")

    def tolerance(self, tensor_name, dtype):
        """Tolerance for one output or gradient."""
        loosened = self.tolerances.get((tensor_name, dtype)) or self.tolerances.get((tensor_name, None))
        return loosened or Tolerance()

    def bind(self, sample):
        """{parameter: value} of a sample, in the order of the signature."""
        return dict(inspect.signature(self.reference).bind(*sample.args, **sample.kwargs).arguments)


def nbytes(*tensors):
    """Bytes of the elements of the tensors (None counts nothing): the helper for `OpSpec.bytes`."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


@functools.cache
def all_specs():
    """{op name: OpSpec} of every module in `longvita_kernels.ops`, sorted by name."""
    package = importlib.import_module("longvita_kernels.ops")
    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__) if not info.name.startswith("_"))
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    return {module.SPEC.name: module.SPEC for module in modules if hasattr(module, "SPEC")}
