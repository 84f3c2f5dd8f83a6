"""What every op module shares: registering flat custom ops, checking arguments, running the reference under an op, autocast.

A flat op is defined once with `define_op`. Its implementation is called by torch's dispatcher directly (no wrapper per call), below
autograd and autocast; `register_autograd` connects it to a backward that is a flat op of its own.
"""

import functools
import math
import os

import torch
from torch.autograd import forward_ad

from longvita_kernels.spec import FLOAT_DTYPES

LIBRARY = torch.library.Library("longvita", "DEF")


def on_device(function):
    """`function` with the GPU of its first tensor as the current device: Triton launches on the current one, whatever its arguments are."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
        if device.type != "cuda":
            return function(*args, **kwargs)
        with torch.cuda.device(device):
            return function(*args, **kwargs)

    return run


def define_op(name, schema, implementation, fake, *, backward=None, setup_context=None, cuda=None, no_gradient_message=None):
    """Register `longvita::{name}` and return its OpOverload, which is what modules call.

    schema               "(Tensor a, float scale) -> (Tensor, Tensor)"; a written argument is annotated, "Tensor(a!) cache"
    implementation       runs on CPU, and on CUDA unless `cuda` is given; gets exactly the schema's arguments. Outputs never alias inputs
    fake                 same arguments → empty outputs of right shape, dtype and layout
    backward             (ctx, *grads) → gradient or None per argument; with `setup_context(ctx, inputs, output)`
    no_gradient_message  what an op without a backward says when a gradient is asked of it; default: no second derivative
    """
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CPU")
    LIBRARY.impl(name, on_device(cuda or implementation), "CUDA")
    qualified = f"longvita::{name}"
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    message = no_gradient_message or (
        f"{qualified} has no second derivative: its gradient cannot be differentiated again. Remedy: call backward or autograd.grad "
        "without create_graph=True, or use the op's reference() for higher derivatives"
    )

    def refuse(ctx, *grads):
        raise RuntimeError(message)

    mutates = "!" in schema
    if not mutates:  # an op that writes in place has no gradient; its public function says so
        torch.library.register_autograd(qualified, backward or refuse, setup_context=setup_context, lib=LIBRARY)
    op = getattr(torch.ops.longvita, name).default
    if backward is not None:
        _EAGER[op] = _autograd_function(name, implementation, setup_context, backward)
    return op


def _autograd_function(name, implementation, setup_context, backward):
    def forward(ctx, *inputs):  # torch's own way of calling setup_context looks up a signature in every call
        outputs = implementation(*inputs)
        setup_context(ctx, inputs, outputs)
        return outputs

    return type(name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})


_EAGER = {}  # op → the same with its gradient as an autograd.Function


def call(op, implementation, tensors, *rest):
    """`op(*tensors, *rest)`, past torch's dispatcher where nothing listens there: a plain call of its CPU implementation or, where only
    autograd does, an autograd.Function made of the same parts. Several times cheaper: the dispatcher takes 0.1 ms a forward and backward.

    tensors  Tensor or None each. The dispatcher is needed for compilation and tracing, modes (fake tensors, functional transforms,
             function modes), subclasses, other devices, and a profiler that would like to see the op.
    """
    listener = _listener(op, tensors)
    if listener is None:
        return implementation(*tensors, *rest)
    function = _EAGER.get(op) if listener == "autograd" else None
    return (op if function is None else function.apply)(*tensors, *rest)


def is_direct(op, tensors):
    """Whether nobody listens and no gradient follows; for a public function whose direct way differs from the op's (it may return less)."""
    return _listener(op, tensors) is None


def _listener(op, tensors):
    """Who follows a call of `op`: None, "autograd" alone, or (also) the "dispatcher"."""
    if forward_ad._current_level >= 0:
        _refuse_tangents(op, tensors)
    if _is_compiling():
        return "dispatcher"
    transform = _peek_interpreter_stack()
    if transform is not None:
        _refuse_derivative(op, transform)
        return "dispatcher"
    if _len_torch_dispatch_stack() or _len_torch_function_stack() or _profiler_enabled() or _is_tracing():
        return "dispatcher"
    found, gradients = None, torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or not tensor.is_cpu:
            return "dispatcher"
        if gradients and tensor.requires_grad:
            found = "autograd"
    return found


def is_traced(*tensors):
    """Whether values cannot be looked at, and sizes must not depend on them: torch.compile, fake tensors, tracing."""
    return _is_compiling() or _len_torch_dispatch_stack() > 0 or any(type(tensor) not in _PLAIN for tensor in tensors if tensor is not None)


def _refuse_tangents(op, tensors):
    """torch would drop them in silence."""
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(f"{op} has no forward-mode derivative. Remedy: use reverse mode (backward), or the op's reference()")


def _refuse_derivative(op, transform):
    """torch would speak of an autograd.Function that nobody has written."""
    if transform.key() in (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp):
        raise RuntimeError(
            f"{op} does not work inside torch.func.grad, vjp, jvp or what is made of them. Remedy: backward() or torch.autograd.grad, or "
            "the op's reference()"
        )


_PLAIN = (torch.Tensor, torch.nn.Parameter)
# Asked in every call, so each is looked up once.
_len_torch_dispatch_stack, _len_torch_function_stack = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_peek_interpreter_stack, _is_tracing = torch._C._functorch.peek_interpreter_stack, torch._C._is_tracing
_profiler_enabled, _is_compiling = torch.autograd._profiler_enabled, torch.compiler.is_compiling


def breaks_graph(function):
    """`function`, which talks to other processes, as a break in the graph of torch.compile. Elsewhere it is a plain call, and the compiler
    is not imported."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        return torch._dynamo.disable(function)(*args, **kwargs) if _is_compiling() else function(*args, **kwargs)

    return run


def dense_like(tensor):
    """An empty contiguous tensor like `tensor`: half the time of new_empty(tensor.shape)."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def plain(tensor):
    """`tensor` without the autograd graph; itself where there is none."""
    return tensor.detach() if tensor.requires_grad else tensor


# ---------------------------------------------------------------------------------------------------------------- running references


def run_reference(reference, *args, **kwargs):
    """`reference(*args, **kwargs)` (or another way inside torch) without gradients and outside autocast, as the body of a flat op: outputs
    are fresh and dense."""
    with torch.no_grad(), _no_autocast(args):
        outputs = reference(*args, **kwargs)
    if isinstance(outputs, torch.Tensor):
        return _fresh((outputs,), args)[0]
    return _fresh(outputs, args)


def reference_gradients(reference, inputs, needs, grads):
    """Gradients of `reference(*inputs)` by autograd, for use inside a backward op.

    inputs  arguments of `reference`; needs  one bool per input; grads  one cotangent (or None: output unused) per output
    → one gradient per input, as a backward op returns it: `absent` where it was not needed, zeros where the input does not matter
    """
    # The dispatcher entered us below autograd; lift that, so that the reference can be differentiated in here.
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradOther", "AutogradCPU", "AutogradCUDA", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad(), _no_autocast(inputs):
        leaves = [x.detach().requires_grad_() if need else x for x, need in zip(inputs, needs, strict=True)]
        outputs = reference(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        used = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None and output.requires_grad]
        wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
        if used and wanted:
            found = torch.autograd.grad([o for o, _ in used], wanted, [g for _, g in used], allow_unused=True, materialize_grads=True)
        else:
            found = [torch.zeros_like(leaf) for leaf in wanted]
    found = iter(_fresh(found, (*inputs, *grads)))
    return tuple(next(found) if need else absent(outputs[0]) for need in needs)


def _fresh(outputs, inputs):
    """Dense and sharing no memory with an input or each other, as torch.library requires of an op's outputs."""
    taken = {x.untyped_storage().data_ptr() for x in inputs if isinstance(x, torch.Tensor)}
    fresh = []
    for output in outputs:
        output = output.contiguous()
        if output.untyped_storage().data_ptr() in taken:
            output = output.clone()
        taken.add(output.untyped_storage().data_ptr())
        fresh.append(output)
    return tuple(fresh)


def _no_autocast(args):
    device = next(arg.device.type for arg in args if isinstance(arg, torch.Tensor))
    return torch.autocast(device, enabled=False)


def compute_dtype(tensor):
    """Dtype a reference computes in: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def absent(anchor):
    """Zero-element float32 stand-in for a gradient that was not asked for, on the device of `anchor`: a flat op returns a fixed number of
    tensors, and its fake must agree on their dtype."""
    return anchor.new_empty(0, dtype=torch.float32)


def pointer_and_strides(tensor, ndim):
    """(address, first `ndim` strides in elements) for a native call; (0, zeros) for None."""
    return (0, (0,) * ndim) if tensor is None else (tensor.data_ptr(), tensor.stride()[:ndim])


def autocast_dtype(device_type):
    """The dtype autocast asks for on this device, or None: the public functions cast to it like `linear` and SDPA do."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def autocast_tensors(*tensors):
    """The tensors cast to the autocast dtype if autocast is on (float64 and None stay as they are), else unchanged."""
    if not torch._C._is_any_autocast_enabled():
        return tensors
    dtype = autocast_dtype(tensors[0].device.type)
    if dtype is None:
        return tensors
    return tuple(t if t is None or t.dtype not in FLOAT_DTYPES else t.to(dtype) for t in tensors)


# ------------------------------------------------------------------------------------------------------------------------- arguments


def check_tensor(name, value, dtype="int32"):
    """A tensor: lists are common where offsets or row numbers are meant."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; expected a tensor. Remedy: torch.tensor({name}, dtype=torch.{dtype})")


def as_offsets(name, cu_seqlens):
    """cu_seqlens as kernels read it: int64, which numpy and torch.cumsum give, becomes int32."""
    check_tensor(name, cu_seqlens)
    return cu_seqlens.to(torch.int32) if cu_seqlens.dtype is torch.int64 else cu_seqlens


def check_shape(name, tensor, expected, legend):
    """Shape must be `expected` (None = any size there). legend: "(T, H, D)"."""
    shape = tensor.shape
    if shape == expected:
        return
    if len(shape) == len(expected):
        for have, want in zip(shape, expected, strict=True):
            if want is not None and have != want:
                break
        else:
            return
    sizes = tuple("any" if want is None else want for want in expected)
    raise ValueError(f"{name} has shape {tuple(shape)}; expected {legend} = {sizes}")


def check_dtype(name, tensor, dtypes):
    """Dtype must be one of `dtypes`."""
    if tensor.dtype not in dtypes:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}; expected one of {wanted}. Cast it with .to(...)")


_REFERENCE_DTYPES = (*FLOAT_DTYPES, torch.float64)


def check_float(name, tensor):
    """float32, bfloat16 or float16 (float64 runs on the reference)."""
    check_dtype(name, tensor, _REFERENCE_DTYPES)


def check_like(name, tensor, other_name, other):
    """Same dtype and device as another argument."""
    if tensor.dtype != other.dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype} but {other_name} has {other.dtype}; cast one of them")
    check_device(name, tensor, other_name, other)


def check_device(name, tensor, other_name, other):
    """Same device as another argument."""
    if tensor.is_cpu and other.is_cpu:
        return
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device} but {other_name} is on {other.device}; move one of them")


def check_last_stride(name, tensor):
    """The last dimension must be dense (other strides are free)."""
    if tensor.is_contiguous():  # these checks run on every call: the cheapest way first
        return
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension; expected 1. Remedy: {name}.contiguous()")


def check_head_dim(name, size):
    """Head dimension: a multiple of 8 up to 256 (made for 32 and more; 8 to 24 work as well)."""
    if size % 8 or not 8 <= size <= 256:
        raise ValueError(f"{name} has head dimension {size}; expected a multiple of 8, at most 256. Pad it with zeros")


def common_case(*tensors):
    """Whether all tensors are float32, bfloat16 or float16 alike, dense and on the CPU: what a check of dtypes, devices and strides that
    found nothing would say, in one call instead of a dozen."""
    dtype = tensors[0].dtype
    if dtype not in FLOAT_DTYPES:
        return False
    for tensor in tensors:
        if tensor.dtype is not dtype or not tensor.is_cpu or not tensor.is_contiguous():
            return False
    return True


def common_offsets(*tensors):
    """The same of int32 tensors with one dimension and at least one entry."""
    for tensor in tensors:
        if tensor.dtype is not torch.int32 or not tensor.is_cpu or tensor.dim() != 1 or not tensor.is_contiguous() or tensor.numel() == 0:
            return False
    return True


def check_cu_seqlens(name, cu_seqlens, device):
    """int32 (n_docs + 1,) on `device`. Its values are checked when the op runs: `check_cu_seqlens_values`."""
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name} has shape {tuple(cu_seqlens.shape)}; expected (n_docs + 1,), the offsets of the documents, at least [0]")
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(f"{name} has dtype {cu_seqlens.dtype}; expected int32. Remedy: {name}.to(torch.int32)")
    if cu_seqlens.device != device:
        raise ValueError(f"{name} is on {cu_seqlens.device}; expected {device}, where the tokens are")


_NO_LIMIT = 2**31 - 1  # tokens are counted in int32: no key lies so far from a query
INTEGERS = (int, torch.SymInt)


def attention_options(window_size, softcap, softmax_scale, dim):
    """(left, right, softcap, scale) as kernels take them: a side of the window that hides nothing is −1, no softcap is 0.

    None, as configurations write it, means no window, no softcap and a scale of 1 / sqrt(dim). ValueError for what makes no sense.
    """
    left = right = -1
    if window_size is not None and window_size != (-1, -1):
        if isinstance(window_size, INTEGERS):
            raise ValueError(
                f"window_size is {window_size!r}; expected (left, right). A sliding window of w keys, the query's own included, is "
                "(w - 1, 0)"
            )
        if len(window_size) != 2 or any(not isinstance(w, INTEGERS) or w < -1 for w in window_size):
            raise ValueError(f"window_size is {window_size!r}; expected (left, right), two ints of at least -1, where -1 means no limit")
        left, right = (-1 if limit >= _NO_LIMIT else limit for limit in window_size)  # sums with sys.maxsize would overflow
    if softcap is None:
        softcap = 0.0
    elif not 0 <= softcap < math.inf:
        raise ValueError(f"softcap is {softcap}; expected a finite number above 0, or 0 or None for none")
    if softmax_scale is None:
        return left, right, float(softcap), 1 / math.sqrt(dim)
    if isinstance(softmax_scale, torch.Tensor) and softmax_scale.requires_grad:
        raise ValueError(
            "softmax_scale requires a gradient, and the op has none for it. Remedy: multiply q by it and pass softmax_scale=1.0; or pass "
            "float(softmax_scale)"
        )
    if not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale is {softmax_scale}; expected a finite number, or None for 1 / sqrt(D)")
    return left, right, float(softcap), float(softmax_scale)


def checks_values(tensor):
    """Whether values may be looked at: always on CPU; elsewhere only with LONGVITA_CHECK=1, because it synchronises."""
    return tensor.device.type == "cpu" or os.environ.get("LONGVITA_CHECK") == "1"


def check_cu_seqlens_values(name, cu_seqlens, total):
    """Starts at 0, never falls, ends at the token count. Call it inside a flat op (never while tracing)."""
    if not checks_values(cu_seqlens):
        return
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise ValueError(f"{name} starts at {offsets[0]}; expected 0")
    if offsets[-1] != total:
        raise ValueError(f"{name} ends at {offsets[-1]} but there are {total} tokens; its last entry must be the number of tokens")
    if any(after < before for before, after in zip(offsets, offsets[1:], strict=False)):
        at = next(i for i in range(len(offsets) - 1) if offsets[i + 1] < offsets[i])
        raise ValueError(f"{name} falls from {offsets[at]} to {offsets[at + 1]} at index {at + 1}; document offsets must not decrease")
