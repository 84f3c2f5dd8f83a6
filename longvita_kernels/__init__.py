"""Attention, projector and vocabulary-head ops for long vision-language models: CPU native, `torch.compile` and autograd included.

The public functions are in `__all__`. Each op lives in `longvita_kernels.ops.<its name>`, ring attention in `longvita_kernels.ring`, and
all are imported when they are first used, so that `import longvita_kernels` costs nothing: no torch, no native library, no compiler.

A process may fork after it has called an op, but the child must stay on one thread (`torch.set_num_threads(1)`, as a DataLoader's worker is
anyway): with more it hangs, as it would in torch's own ops, because the threads of libgomp do not survive a fork.
"""

from importlib import import_module

__version__ = "0.1.0"

__all__ = [
    "append_kv",
    "decode_attention",
    "linear_cross_entropy",
    "masked_lm_head",
    "merge_attention",
    "pixel_shuffle_projection",
    "plan_context_parallel",
    "ring_attention",
    "varlen_attention",
]

# Names that live elsewhere than in ops.<name>; the class is what plan_context_parallel returns, for annotations.
_PLACES = {"ContextParallelPlan": "ring.plan", "plan_context_parallel": "ring.plan", "ring_attention": "ring.attention"}

_SUBMODULES = ("backends", "memory", "native", "spec", "testing")


def __getattr__(name):
    if name in __all__ or name in _PLACES:
        value = getattr(import_module(f"{__name__}.{_PLACES.get(name, f'ops.{name}')}"), name)
    elif name in _SUBMODULES:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__, *_PLACES, *_SUBMODULES})
