"""Which implementation runs an op: `reference` (plain torch, any device) or `native` (C++, CPU).

    backends.available()                     # ("native", "reference"): what this machine can run, best first
    backends.use("reference")                # from now on, for every op …
    with backends.use("native"): ...         # … or inside a block
    backends.explain("merge_attention", out_a, lse_a, out_b, lse_b)

Without a request the best backend that can take the call is chosen; when the native part is missing that is the reference, with one
warning. The environment variable LONGVITA_BACKEND is a request like `use`. A request that cannot be met raises `RuntimeError`.
"""

import functools
import importlib
import inspect
import os
import warnings

import torch

from longvita_kernels import native

NAMES = ("native", "reference")  # best first
_NATIVE_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


def available():
    """Names of the backends that can run on this machine, best first."""
    return NAMES if native.load() is not None else ("reference",)


def _checked(name):
    if name is None or name in ("", "auto"):
        return None
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}; expected one of {', '.join(NAMES)}, or 'auto' to choose by call")
    if name == "native" and native.load() is None:
        raise RuntimeError(f"backend 'native' was requested but cannot be used: {native.why_missing()}")
    return name


class use:
    """Request a backend for every op: `use("reference")` from now on, `with use("reference"):` for a block. `use("auto")` ends a request.

    Raises ValueError for an unknown name and RuntimeError, saying what is missing, when that backend is not there.
    """

    _requested = None  # the one piece of state; per process, like torch's own backend switches
    _read_environment = False

    def __init__(self, name):
        checked = _checked(name)
        self._before = requested()
        use._requested = checked

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        use._requested = self._before


def requested():
    """The backend asked for by `use` or LONGVITA_BACKEND, or None."""
    if not use._read_environment:
        use._requested = _checked(os.environ.get("LONGVITA_BACKEND"))
        use._read_environment = True
    return use._requested


@functools.cache
def _native_lacks(op):
    """Why the loaded native library has no kernel for `op` (its functions start with the op's name), or None."""
    module = native.load()
    if module is None:
        return f"the native library is missing: {native.why_missing()}"
    if not any(function.startswith(op) for function in dir(module)):
        return f"the native library was built without {op}; build it again: python setup.py build_ext --inplace"
    return None


@functools.cache
def _warn_once(op, reason):
    warnings.warn(f"longvita_kernels runs {op} on the plain torch reference: {reason}", RuntimeWarning, stacklevel=4)


def _decide(op, tensor, unsupported):
    """(backend, why, worth a warning)."""
    request = requested()
    if request == "reference":
        return "reference", "requested", False
    if tensor.device.type != "cpu":
        reason, warn = f"there is no kernel for device {tensor.device.type!r} yet", True
    elif tensor.dtype not in _NATIVE_DTYPES:
        reason, warn = f"the native kernel takes float32, bfloat16 and float16, not {tensor.dtype}", False
    elif unsupported is not None:
        reason, warn = unsupported, True
    else:
        reason = _native_lacks(op)
        if reason is None:
            return "native", "requested" if request else f"the best for device 'cpu' and {tensor.dtype}", False
        warn = True
    if request == "native":
        raise RuntimeError(f"backend 'native' was requested but cannot run {op}: {reason}")
    return "reference", reason, warn


def choose(op, tensor, unsupported=None):
    """Backend for one call of `op` whose first tensor is `tensor`.

    `unsupported` says why the native kernel cannot take this problem: a fixed text without the call's values, as it is warned of once.
    """
    if (  # the common case, which every call pays for, without a reason being put into words
        unsupported is None and use._requested != "reference" and use._read_environment and tensor.is_cpu
        and tensor.dtype in _NATIVE_DTYPES and _native_lacks(op) is None
    ):  # fmt: skip
        return "native"
    backend, reason, warn = _decide(op, tensor, unsupported)
    if warn:
        _warn_once(op, reason)
    return backend


def _unsupported(op, args, kwargs):
    """What the op's module says in `native_cannot(**arguments)` of a call that its native kernel does not take, or None."""
    module = importlib.import_module(f"longvita_kernels.ops.{op}")
    if not hasattr(module, "native_cannot"):
        return None
    return module.native_cannot(**inspect.signature(getattr(module, op)).bind_partial(*args, **kwargs).arguments)


def explain(op, *args, **kwargs):
    """One line: which backend a call `op(*args, **kwargs)` would run on, and why. RuntimeError for a request that cannot be met."""
    tensor = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.Tensor)), None)
    if tensor is None:
        raise ValueError(f"explain({op!r}, ...) needs the call's tensors to tell device and dtype; got none")
    backend, reason, _ = _decide(op, tensor, _unsupported(op, args, kwargs))
    return f"{op}: {backend} ({reason})"
