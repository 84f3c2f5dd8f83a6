"""Which implementation runs an op.

    native       C++, CPU
    cuda         GPU kernels of this package in CUDA C++, for the ops in CUDA_OPS (on CPU tensors under LONGVITA_CUDA_EMULATED, for tests)
    triton       GPU kernels of this package (on CPU tensors under TRITON_INTERPRET=1, for tests)
    flash_attn   the package of that name, for varlen_attention on a GPU, for those who have it
    torch        the fastest way inside torch, any device: the inputs' own dtype, torch's attention kernels, products of cuBLAS
    reference    plain torch, float32 inside: the definition, any device

    backends.available()                     # ("native", "torch", "reference"): what this machine can run, best first
    backends.use("reference")                # from now on, for every op …
    with backends.use("triton"): ...         # … or inside a block
    backends.explain("merge_attention", out_a, lse_a, out_b, lse_b)

Without a request a CPU gets `native`. A GPU gets the fastest backend that VERIFIED names for the op on that architecture: a kernel that
never ran on hardware is never a default. Where nothing is named a GPU gets `torch`, with one warning; a CPU without native the reference.
The environment variable LONGVITA_BACKEND is a request like `use`. A request that cannot be met raises `RuntimeError`; a request for
`cuda` or `flash_attn` concerns the ops that they have, the others are chosen as without it.
"""

import functools
import importlib.util
import inspect
import os
import warnings
from typing import NamedTuple

import torch

from longvita_kernels import native

NAMES = ("native", "cuda", "triton", "flash_attn", "torch", "reference")  # best first
_KERNEL_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_HALF_DTYPES = frozenset((torch.bfloat16, torch.float16))
# Ops that are written for these; every other backend has all ops.
CUDA_OPS = frozenset(("varlen_attention", "merge_attention", "masked_lm_head"))
FLASH_OPS = frozenset(("varlen_attention",))
_CONCERNS = {"cuda": CUDA_OPS, "flash_attn": FLASH_OPS}


class Verified(NamedTuple):
    """A backend whose GPU tests passed on an architecture, and the file in bench/results/ that says so and how fast it was."""

    backend: str
    result: str


# (op, architecture such as "sm_90") → Verified, the fastest first. bench/gpu.sh makes the results that an entry needs, and a test
# (bench/verified.py) holds it to them; so far no GPU has.
VERIFIED: dict[tuple[str, str], tuple[Verified, ...]] = {}


def available():
    """Names of the backends that can run on this machine, best first."""
    return tuple(name for name in NAMES if _missing(name) is None)


def _missing(name):
    """Why a backend cannot be used on this machine at all, or None."""
    if name == "native":
        return None if native.load() is not None else native.why_missing()
    if name not in ("cuda", "triton", "flash_attn"):
        return None
    missing = _cuda().why_missing() if name == "cuda" else _not_installed(name)
    if missing is not None:
        return missing
    if torch.cuda.is_available() or _on_cpu(name):
        return None
    return "there is no CUDA device" + (" (TRITON_INTERPRET=1 runs its kernels on CPU tensors, slowly)" if name == "triton" else "")


@functools.cache
def _not_installed(name):
    found = importlib.util.find_spec(name) is not None
    return None if found else f"the package {name} is not installed; pip install {name.replace('_', '-')}"


def _cuda():
    from longvita_kernels.cuda import native_cuda

    return native_cuda


def _interpreted():
    return os.environ.get("TRITON_INTERPRET") == "1"


def _checked(name):
    if name is None or name in ("", "auto"):
        return None
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}; expected one of {', '.join(NAMES)}, or 'auto' to choose by call")
    missing = _missing(name)
    if missing is not None:
        raise RuntimeError(f"backend {name!r} was requested but cannot be used: {missing}")
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
def _native_lacks(op, backend="native"):
    """Why the loaded native library of a backend has no kernel for `op` (its functions start with the op's name), or None."""
    library = native if backend == "native" else _cuda()
    module = library.load()
    if module is None:
        return f"the native library is missing: {library.why_missing()}"
    if not any(function.startswith(op) for function in dir(module)):
        switch = "" if backend == "native" else "LONGVITA_CUDA=1 "
        return f"the native library was built without {op}; build it again: {switch}python setup.py build_ext --inplace"
    return None


@functools.cache
def _warn_once(op, backend, reason):
    what = "the plain torch reference" if backend == "reference" else "torch's own kernels and products"
    warnings.warn(f"longvita_kernels runs {op} on {what}: {reason}", RuntimeWarning, stacklevel=4)


@functools.cache
def architecture(device):
    """ "sm_90" and the like; a device that is no GPU is called by its type."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else device.type


def _on_cpu(backend):
    """Whether a backend for GPUs takes CPU tensors now, for tests."""
    return _interpreted() if backend == "triton" else backend == "cuda" and _cuda().emulated()


def _cannot(backend, op, tensor, unsupported, cuda_cannot):
    """Why `backend` cannot run this call, or None."""
    device, dtypes = tensor.device.type, _HALF_DTYPES if backend == "flash_attn" else _KERNEL_DTYPES
    if backend in ("reference", "torch"):
        return None
    if backend == "native" and device != "cpu":
        return f"there is no kernel for device {device!r}"
    if backend != "native" and device != "cuda" and not (device == "cpu" and _on_cpu(backend)):
        return f"{backend} runs on CUDA tensors, not on device {device!r}"
    if tensor.dtype not in dtypes:
        wanted = "bfloat16 and float16" if backend == "flash_attn" else "float32, bfloat16 and float16"
        return f"the {backend} kernel takes {wanted}, not {tensor.dtype}"
    if unsupported is not None:
        return unsupported
    if backend in ("native", "cuda"):
        return _native_lacks(op, backend) or (cuda_cannot() if backend == "cuda" and cuda_cannot is not None else None)
    return _not_installed(backend)


def _decide(op, tensor, unsupported, cuda_cannot=None):
    """(backend, why, worth a warning)."""
    request = requested()
    concerned = _CONCERNS.get(request)
    if request is not None and (concerned is None or op in concerned):
        reason = _cannot(request, op, tensor, unsupported, cuda_cannot)
        if reason is None:
            return request, _requested_words(op, request, tensor), False
        raise RuntimeError(f"backend {request!r} was requested but cannot run {op}: {reason}")
    if tensor.device.type == "cuda":
        arch = architecture(tensor.device)
        for verified in VERIFIED.get((op, arch), ()):
            if _cannot(verified.backend, op, tensor, unsupported, cuda_cannot) is None:
                return verified.backend, f"the fastest verified on {arch}, see {verified.result}", False
        if tensor.dtype not in _KERNEL_DTYPES:
            return "reference", f"kernels take float32, bfloat16 and float16, not {tensor.dtype}", False
        return "torch", unsupported or f"no kernel is verified on {arch} yet; backends.use('triton') asks for ours", True
    reason = _cannot("native", op, tensor, unsupported, None)
    if reason is None:
        return "native", f"the best for device 'cpu' and {tensor.dtype}", False
    return "reference", reason, tensor.dtype in _KERNEL_DTYPES


def _requested_words(op, request, tensor):
    if request not in ("cuda", "triton", "flash_attn"):
        return "requested"
    arch = architecture(tensor.device)
    result = next((verified.result for verified in VERIFIED.get((op, arch), ()) if verified.backend == request), None)
    return f"requested; verified on {arch}, see {result}" if result else f"requested; not verified on {arch}"


def choose(op, tensor, unsupported=None, cuda_cannot=None):
    """Backend for one call of `op` whose first tensor is `tensor`.

    `unsupported` says why compiled kernels cannot take this problem: a fixed text without the call's values, as it is warned of once.
    `cuda_cannot()` says why the CUDA C++ kernel alone cannot, or None; it is asked only where that kernel is considered.
    """
    if (  # the common case, which every call pays for, without a reason being put into words
        unsupported is None and use._requested in (None, "native") and use._read_environment and tensor.is_cpu
        and tensor.dtype in _KERNEL_DTYPES and _native_lacks(op) is None
    ):  # fmt: skip
        return "native"
    backend, reason, warn = _decide(op, tensor, unsupported, cuda_cannot)
    if warn:
        _warn_once(op, backend, reason)
    return backend


def _unsupported(op, args, kwargs):
    """What the op's module says of a call: `native_cannot(**arguments)`, why compiled kernels do not take it, or None; `cuda_cannot`."""
    module = importlib.import_module(f"longvita_kernels.ops.{op}")
    arguments = inspect.signature(getattr(module, op)).bind_partial(*args, **kwargs).arguments
    native_cannot, cuda_cannot = (getattr(module, name, lambda **_: None) for name in ("native_cannot", "cuda_cannot"))
    return native_cannot(**arguments), functools.partial(cuda_cannot, **arguments)


def explain(op, *args, **kwargs):
    """One line: which backend a call `op(*args, **kwargs)` would run on, and why. RuntimeError for a request that cannot be met."""
    tensor = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.Tensor)), None)
    if tensor is None:
        raise ValueError(f"explain({op!r}, ...) needs the call's tensors to tell device and dtype; got none")
    backend, reason, _ = _decide(op, tensor, *_unsupported(op, args, kwargs))
    return f"{op}: {backend} ({reason})"
