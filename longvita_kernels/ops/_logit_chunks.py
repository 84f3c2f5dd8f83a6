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
    labels, rows, buffer = labels.contiguous(), torch.empty(2 * tokens, dtype=torch.int64), torch.empty(floats, dtype=torch.float32)
    loss = torch.empty((), dtype=torch.float32)
    counts = module.linear_cross_entropy_loss(
        native.dtype_code(hidden.dtype), tokens, width, vocab, hidden.data_ptr(), hidden.stride(0), weight.data_ptr(), weight.stride(0),
        labels.data_ptr(), ignore_index, 0 if loss_weight is None else loss_weight.data_ptr(), softcap, label_smoothing, z_loss, mean,
        chunk, rows.data_ptr(), buffer.data_ptr(), floats, threads, loss.data_ptr(),
        0 if square_sum is None else square_sum.data_ptr(),
    )  # fmt: skip
    return loss, counts


def run_native(hidden, weight, rows, labels, softcap, statistics, *, coefficients=None, recompute=False, row_weight=None, smoothing=0.0,
               z_loss=0.0, needs=(False, False)):  # fmt: skip
    """Fills statistics (5, R) of `rows` (R,) of hidden, or reads them to recompute → gradients (R, H), float32, and (V, H), float32 or,
    where recomputed, in weight's dtype."""
    module, vocab = native.load(), weight.shape[0]
    code = native.dtype_code(hidden.dtype)
    logit_bytes = module.linear_cross_entropy_logit_bytes(code, softcap, recompute)
    chunk = (chunk_columns if recompute else chunk_rows)(vocab, rows.shape[0], logit_bytes)
    blocks = -(-vocab // module.linear_cross_entropy_block())
    if coefficients is None:
        coefficients = torch.empty(3, rows.shape[0] if any(needs) else 0, dtype=torch.float32)
    partial = torch.empty(0 if recompute else 3 * blocks * chunk, dtype=torch.float32)
    logits = torch.empty(chunk * (rows.shape[0] if recompute else vocab) if any(needs) else 0,
                         dtype=torch.float32 if logit_bytes == 4 else torch.bfloat16)  # fmt: skip
    sizes = ((rows.shape[0], torch.float32), (vocab, weight.dtype if recompute else torch.float32))
    grads = [torch.empty(n, hidden.shape[1], dtype=dtype) if need else _common.absent(hidden)
             for (n, dtype), need in zip(sizes, needs, strict=True)]  # fmt: skip
    scratch = _gemm.scratch()
    module.linear_cross_entropy_run(
        code, *hidden.shape, vocab, rows.shape[0],
        hidden.data_ptr(), hidden.stride(0), weight.data_ptr(), weight.stride(0), rows.data_ptr(), labels.data_ptr(),
        softcap, statistics.data_ptr(), chunk, partial.data_ptr(), scratch.data_ptr(), torch.get_num_threads(),
        recompute, coefficients.data_ptr(), 0 if row_weight is None else row_weight.data_ptr(), smoothing, z_loss,
        logits.data_ptr(), grads[0].data_ptr(), grads[1].data_ptr(),
    )  # fmt: skip
    return grads


def scaled(values, factor, dtype):
    """values (dense float32) · factor, rounded once to `dtype`; the product is never held in float32."""
    out = torch.empty(values.shape, dtype=dtype)
    native.load().linear_cross_entropy_scale(
        values.data_ptr(), values.numel(), float(factor), native.dtype_code(dtype), out.data_ptr(), torch.get_num_threads()
    )
    return out
