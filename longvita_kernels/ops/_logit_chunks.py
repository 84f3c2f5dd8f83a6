"""`hidden @ weight.T` visited chunk by chunk: what linear_cross_entropy asks of the native kernel (csrc/cpu/cross_entropy.h)."""

import torch

from longvita_kernels import native
from longvita_kernels.ops import _common, _gemm


def check_labels(labels, rows, ignore_index, vocab_size):
    """Labels must be ignore_index or lie in 0 … vocab_size−1; names the first that does not."""
    if not _common.checks_values(labels):
        return
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocab_size))
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"labels[{at if rows is None else int(rows[at])}] is {int(labels[at])}; expected 0 … {vocab_size - 1}, or ignore_index = "
            f"{ignore_index}. Remedy: check that the tokenizer belongs to the model, or set such labels to ignore_index"
        )


_BYTES = 16 << 20  # of logits at a time, if that leaves the products enough rows or columns


def chunk_rows(vocab, rows, logit_bytes):
    """Rows whose logits exist at one time: a function of the sizes alone, because the order of sums follows it."""
    return max(1, min(rows, max(1024 // logit_bytes, min(2048, _BYTES // (logit_bytes * vocab)))))


def chunk_columns(vocab, rows, logit_bytes):
    """Columns whose logits exist at one time where they are made again: likewise."""
    return max(1, min(vocab, max(1024 // logit_bytes, _BYTES // (logit_bytes * max(rows, 1)) // 256 * 256)))


def native_loss(hidden, weight, labels, ignore_index, loss_weight, softcap, z_loss, label_smoothing, mean, square_sum):
    """Loss of all supervised rows, where no gradient follows, in one native call; writes Σ lse² to `square_sum`, if it is not None.
    → loss, (number of supervised rows, of correct ones)"""
    module, threads, (tokens, width), vocab = native.load(), torch.get_num_threads(), hidden.shape, weight.shape[0]
    chunk = chunk_rows(vocab, tokens, module.linear_cross_entropy_logit_bytes(native.dtype_code(hidden.dtype), softcap, False))
    floats = threads * module.gemm_scratch_floats() + 5 * tokens + 3 * -(-vocab // module.linear_cross_entropy_block()) * chunk
    labels, rows, buffer = labels.contiguous(), torch.empty(2 * tokens, dtype=torch.int64), _gemm.take(floats)
    loss = torch.empty((), dtype=torch.float32)
    counts = module.linear_cross_entropy_loss(
        native.dtype_code(hidden.dtype), tokens, width, vocab, hidden.data_ptr(), hidden.stride(0), weight.data_ptr(), weight.stride(0),
        labels.data_ptr(), ignore_index, 0 if loss_weight is None else loss_weight.data_ptr(), softcap, label_smoothing, z_loss, mean,
        chunk, rows.data_ptr(), buffer.data_ptr(), floats, threads, loss.data_ptr(),
        0 if square_sum is None else square_sum.data_ptr(),
    )  # fmt: skip
    _gemm.give_back(buffer)
    return loss, counts


def logit_bytes(hidden, softcap):
    """Bytes of one logit gradient as the native kernel holds it."""
    return native.load().linear_cross_entropy_logit_bytes(native.dtype_code(hidden.dtype), softcap, False)


def _run(way, hidden, weight, rows, labels, softcap, chunk, logits, grads, needs, *, statistics=None, coefficients=None, partial=None,
         row_weight=None, smoothing=0.0, z_loss=0.0, factor=1.0):  # fmt: skip
    def at(tensor):
        return 0 if tensor is None else tensor.data_ptr()

    scratch = _gemm.take(_gemm.scratch_floats())
    native.load().linear_cross_entropy_run(
        native.dtype_code(hidden.dtype), *hidden.shape, weight.shape[0], rows.shape[0], at(hidden), hidden.stride(0), at(weight),
        weight.stride(0), at(rows), at(labels), softcap, at(statistics), chunk, at(partial), at(scratch), torch.get_num_threads(), way,
        at(coefficients), at(row_weight), smoothing, z_loss, at(logits), factor, needs[0], at(grads[0]), needs[1],
        at(grads[1]),
    )  # fmt: skip
    _gemm.give_back(scratch)


def run_native(hidden, weight, rows, labels, softcap, statistics, *, needs=(False, False), keep=0, row_weight=None, smoothing=0.0,
               z_loss=0.0):  # fmt: skip
    """Fills statistics (5, R) of `rows` (R,) of hidden → gradients (R, H) and (V, H), float32; or, with keep = logit_bytes(…), those of the
    logits (R, V), for `finish`."""
    vocab, size = weight.shape[0], rows.shape[0]
    bytes_each = keep or native.load().linear_cross_entropy_logit_bytes(native.dtype_code(hidden.dtype), softcap, False)
    chunk = max(1, size) if keep else chunk_rows(vocab, size, bytes_each)
    logits = torch.empty(size if keep else chunk if any(needs) else 0, vocab, dtype=kept_dtype(bytes_each))
    grads = (_common.absent(hidden),) * 2 if keep else [
        torch.empty(n, hidden.shape[1], dtype=torch.float32) if need else _common.absent(hidden)
        for n, need in zip((size, vocab), needs, strict=True)]  # fmt: skip
    _run(
        "keep" if keep else "at_once", hidden, weight, rows, labels, softcap, chunk, logits, grads, needs, statistics=statistics,
        coefficients=torch.empty(3, size if any(needs) else 0, dtype=torch.float32),
        partial=torch.empty(3, -(-vocab // native.load().linear_cross_entropy_block()), chunk, dtype=torch.float32),
        row_weight=row_weight, smoothing=smoothing, z_loss=z_loss,
    )  # fmt: skip
    return logits if keep else grads


def kept_dtype(bytes_each):
    return torch.float32 if bytes_each == 4 else torch.bfloat16


def finish(hidden, weight, rows, kept_RV, factor, needs):
    """Gradients of hidden (T, H) and weight, where needed, from those of the logits of `rows`, times factor; rounded once."""
    grads = [torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[1] else _common.absent(weight)]
    grads.insert(0, torch.zeros_like(hidden, memory_format=torch.contiguous_format) if needs[0] else _common.absent(hidden))
    softcap = 1.0 if kept_RV.dtype == torch.float32 else 0.0  # any softcap tells the kernel that they are float32 (keeps_bf16)
    _run("finish", hidden, weight, rows, rows, softcap, max(1, rows.shape[0]), kept_RV, grads, needs, factor=float(factor))
    return tuple(grads)


def run_again(hidden, weight, rows, labels, softcap, statistics, coefficients, needs):
    """Gradients from those of the statistics (3, R), with the logits made again → (R, H), float32, and (V, H) in weight's dtype."""
    bytes_each = native.load().linear_cross_entropy_logit_bytes(native.dtype_code(hidden.dtype), softcap, True)
    chunk = chunk_columns(weight.shape[0], rows.shape[0], bytes_each)
    logits = torch.empty(rows.shape[0], chunk, dtype=kept_dtype(bytes_each))
    grads = [torch.empty(n, hidden.shape[1], dtype=dtype) if need else _common.absent(hidden)
             for n, dtype, need in zip((rows.shape[0], weight.shape[0]), (torch.float32, weight.dtype), needs, strict=True)]  # fmt: skip
    options = {"statistics": statistics, "coefficients": coefficients}
    _run("recompute", hidden, weight, rows, labels, softcap, chunk, logits, grads, needs, **options)
    return grads


def scaled(values, factor, dtype):
    """values (dense float32) · factor, rounded once to `dtype`; the product is never held in float32."""
    out = torch.empty(values.shape, dtype=dtype)
    native.load().linear_cross_entropy_scale(
        values.data_ptr(), values.numel(), float(factor), native.dtype_code(dtype), out.data_ptr(), torch.get_num_threads()
    )
    return out
