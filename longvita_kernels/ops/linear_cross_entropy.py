"""Cross entropy of `hidden @ weight.T` without the logits.

    l[t, v] = softcap(hidden[t] · weight[v])        softcap(x) = c · tanh(x / c), or x where c = 0
    lse[t]  = log Σ_v exp l[t, v]
    loss[t] = (1 − s)·(lse[t] − l[t, label[t]]) + s·(lse[t] − mean_v l[t, v]) + z·lse[t]²

(T, H): hidden. (V, H): weight. (T,): labels, already shifted. s label_smoothing, z z_loss. Rows whose label is ignore_index are dropped
before anything is computed. R: rows that are left. Logits exist for one chunk of rows at a time (`_logit_chunks`); a chunk gives
its loss and, in the same visit, both gradients for a summed loss, which backward only scales. Where the rows are so few that their logits
are no larger than the float32 gradient of weight, the logits' gradients are kept instead, and backward multiplies them. For
reduction="none" and for a vocabulary that is spread over processes the gradients need numbers that come later, so backward makes the
logits again.

Sources: Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models" (arXiv 2411.09009); Hsu et al. 2024, Liger Kernel
(arXiv 2410.10989), for gradients in the forward pass; Chowdhery et al. 2022 (PaLM) for z_loss.
"""

from typing import NamedTuple

import torch

from longvita_kernels import backends
from longvita_kernels.ops import _common, _logit_chunks, _loss_arguments, _loss_path, _vocab_parallel
from longvita_kernels.spec import OpSpec, SampleInput, nbytes


class LossStats(NamedTuple):
    """What the loss saw, as tensors without gradient."""

    n_supervised: torch.Tensor  # int64: rows whose label is not ignore_index
    n_correct: torch.Tensor  # int64: of these, rows whose label has the largest logit
    lse_square_sum: torch.Tensor  # float32: Σ lse² over them, what z_loss multiplies


def reference(hidden, weight, labels, *, ignore_index=-100, reduction="sum", loss_weight=None, softcap=0.0, z_loss=0.0,
              label_smoothing=0.0, return_stats=False, low_memory=False):  # fmt: skip
    """The definition in plain torch, float32 inside (float64 for float64)."""
    dtype = _common.compute_dtype(hidden)
    rows = (labels != ignore_index).nonzero().squeeze(1)
    statistics = _statistics(hidden[rows].to(dtype) @ weight.to(dtype).T, labels[rows], softcap)
    return _finish(statistics, rows, labels, weight.shape[0], ignore_index, reduction, loss_weight, z_loss, label_smoothing, return_stats)


def base(hidden, weight, labels, *, ignore_index=-100, reduction="sum", loss_weight=None, softcap=0.0, z_loss=0.0, label_smoothing=0.0,
         return_stats=False, low_memory=False):  # fmt: skip
    """The plain composition: logits in the inputs' own dtype, then the loss in float32."""
    rows = (labels != ignore_index).nonzero().squeeze(1)
    logits = torch.nn.functional.linear(hidden[rows], weight)
    statistics = _statistics(logits.to(_common.compute_dtype(hidden)), labels[rows], softcap)
    return _finish(statistics, rows, labels, weight.shape[0], ignore_index, reduction, loss_weight, z_loss, label_smoothing, return_stats)


def _statistics(logits_RV, labels_R, softcap):
    """(5, R): lse, logit of the label (0 where the label lies in another part of the vocabulary), sum and maximum of the logits l, and
    Σ exp(l − maximum), from which probabilities are more exact than from lse; no gradient runs through the last two."""
    if softcap > 0.0:
        logits_RV = softcap * torch.tanh(logits_RV / softcap)
    here_R = (labels_R >= 0) & (labels_R < logits_RV.shape[1])
    target_R = torch.where(here_R, logits_RV.gather(1, torch.where(here_R, labels_R, 0).unsqueeze(1)).squeeze(1), 0.0)
    largest_R = logits_RV.detach().amax(1)
    exp_sum_R = (logits_RV.detach() - largest_R.unsqueeze(1)).exp().sum(1)
    return torch.stack((logits_RV.logsumexp(1), target_R, logits_RV.sum(1), largest_R, exp_sum_R))


def _row_loss(statistics, vocab_size, z_loss, label_smoothing):
    lse, target, total = statistics[:3]
    loss = (1.0 - label_smoothing) * (lse - target)
    if label_smoothing > 0.0:
        loss = loss + label_smoothing * (lse - total / vocab_size)
    return loss + z_loss * lse.square() if z_loss > 0.0 else loss


def _finish(statistics, rows, labels, vocab_size, ignore_index, reduction, loss_weight, z_loss, label_smoothing, return_stats):
    """Loss and stats from the statistics of `rows` (R,)."""
    loss = _row_loss(statistics, vocab_size, z_loss, label_smoothing)
    supervised = labels[rows] != ignore_index
    weight = supervised.to(loss.dtype) if loss_weight is None else _masked(loss_weight.detach()[rows].to(loss.dtype), supervised)
    loss = torch.where(supervised, loss, 0.0) * weight  # a row that was not computed may hold anything
    loss = loss.new_zeros(labels.shape[0]).index_copy(0, rows, loss) if reduction == "none" else loss.sum()
    return _with_stats(loss / _divisor(weight) if reduction == "mean" else loss, statistics, supervised, return_stats)


def _masked(loss_weight, supervised):
    """Weights of the supervised rows, 0 elsewhere whatever stands there (NaN · 0 would be NaN)."""
    return torch.where(supervised, loss_weight, 0.0)


def _divisor(weight):
    """Σ weight, and 1 where that is 0: nothing supervised gives a loss of 0."""
    total = weight.sum()
    return torch.where(total == 0, 1.0, total)


def _with_stats(loss, statistics, supervised, return_stats):
    if not return_stats:
        return loss
    lse, target, _, largest = statistics.detach()[:4]
    squares = torch.where(supervised, lse, 0.0).square().sum()
    return loss, LossStats(supervised.sum(), (supervised & (target >= largest)).sum(), squares)


def linear_cross_entropy(hidden, weight, labels, *, ignore_index=-100, reduction="sum", loss_weight=None, softcap=0.0, z_loss=0.0,
                         label_smoothing=0.0, return_stats=False, vocab_start=0, vocab_group=None, low_memory=False):  # fmt: skip
    """Cross entropy between `hidden @ weight.T` and `labels`; made without the (T, V) logits in float32 (see Memory).

    hidden (T, H), weight (V, H)  float32, bfloat16 or float16, alike; last dimension dense, rows may be strided; both take gradients
    labels (T,) int64             already shifted: labels[t] is what hidden[t] predicts; rows with ignore_index cost nothing
    reduction                     "sum"; "mean", divided by Σ loss_weight (without it: the number) of supervised rows; or "none", (T,)
    loss_weight (T,)              factor of each row's loss; takes no gradient; any sign, but for a mean at least 0. What stands at rows
                                  that are not supervised does not matter
    softcap, z_loss, label_smoothing   as in the equation of this module; 0 or None turns each off
    return_stats                  → (loss, LossStats)
    vocab_start, vocab_group      tensor-parallel head: weight holds rows vocab_start … vocab_start+V−1 of the whole, labels stay global;
                                  every process of the torch.distributed group makes the call, and gets the whole gradient of hidden
    low_memory                    keep nothing for backward and make the logits again there: a fourth matrix product instead of a float32
                                  gradient of weight. reduction="none" and vocab_group always do so
    → loss, float32. Nothing supervised gives 0. Sums are in float32, gradients are rounded once, and a frozen input skips its matmul.

    Memory beside inputs and outputs: one chunk of logits, at most max(16 MiB, V KiB), and 7.7 MiB a thread, kept for the next call;
    from forward to backward the float32 gradients of the supervised rows (R, H) and of weight (V, H), where needed (under torch.compile
    (T, H): R is not known there); or, where that is smaller than the latter, the gradients of the logits (R, V), in 16 bits where those
    are multiplied. With low_memory: at most max(16 MiB, R KiB) of logits and, in backward, the float32 gradient of the rows (R, H). On a
    GPU R is not known to the host and counts as T, and a chunk of logits takes up to 1.25 GiB (inside torch 2.5 GiB, and R is read back).
    Raises ValueError for arguments that do not fit and, on the CPU, for a label outside 0 … V−1 that is not ignore_index.
    """
    hidden, weight = _common.autocast_tensors(hidden, weight)
    # Configurations write None for what is off.
    ignore_index = -100 if ignore_index is None else ignore_index
    softcap, z_loss, label_smoothing = (0.0 if value is None else value for value in (softcap, z_loss, label_smoothing))
    settings = (softcap, z_loss, label_smoothing, vocab_start, vocab_group)
    _loss_arguments.check(hidden, weight, labels, ignore_index, reduction, loss_weight, *settings)
    if loss_weight is not None:
        loss_weight = loss_weight.detach().to(_common.compute_dtype(hidden))
    if (
        vocab_group is None and reduction != "none" and _common.is_direct(_rows, (hidden, weight, labels, loss_weight))
        and backends.choose("linear_cross_entropy", hidden) == "native"
    ):  # fmt: skip
        weight_T = None if loss_weight is None else loss_weight.contiguous()
        squares = torch.empty((), dtype=torch.float32) if return_stats else None
        options = (ignore_index, weight_T, softcap, z_loss, label_smoothing, reduction == "mean", squares)
        loss, counts = _logit_chunks.native_loss(hidden, weight, labels, *options)
        return (loss, LossStats(*map(torch.tensor, counts), squares)) if return_stats else loss
    vocab_size = weight.shape[0]
    if vocab_group is not None:
        vocab_size = _vocab_parallel.total(vocab_size, hidden.device, vocab_group)
        hidden = _vocab_parallel.sum_gradient(hidden, vocab_group)
    needs = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight)]
    if vocab_group is None and reduction != "none" and any(needs) and not low_memory:
        return _summed(hidden, weight, labels, needs, ignore_index, reduction, loss_weight, softcap, z_loss, label_smoothing, return_stats)
    options = (ignore_index, softcap, vocab_start, vocab_size)
    statistics = _common.call(_rows, _rows_impl, (hidden, weight, labels), *options)
    if vocab_group is not None:
        statistics = _vocab_parallel.join_statistics(statistics, vocab_group)
    everything = torch.arange(labels.shape[0], device=labels.device)
    return _finish(statistics, everything, labels, vocab_size, ignore_index, reduction, loss_weight, z_loss, label_smoothing, return_stats)


def _summed(hidden, weight, labels, needs, ignore_index, reduction, loss_weight, softcap, z_loss, label_smoothing, return_stats):
    """Loss with both gradients from one visit of every chunk."""
    traced = _common.is_traced(hidden, weight, labels, loss_weight)
    backend = None if traced else backends.choose("linear_cross_entropy", hidden)
    if not traced and (hidden.is_cpu or backend == "torch"):
        rows = (labels != ignore_index).nonzero().squeeze(1)  # so that what waits for backward has R rows, not T
    else:
        rows = torch.arange(labels.shape[0], device=labels.device)
    keep = _kept_bytes(hidden, rows.shape[0], softcap, backend) if needs[1] and not traced else 0
    picked = labels[rows]
    picked_weight = None if loss_weight is None else loss_weight[rows]
    tensors = (hidden, weight, rows, picked, picked_weight)
    loss, statistics, _, _ = _common.call(_loss, _loss_impl, tensors, ignore_index, softcap, z_loss, label_smoothing, needs, keep)
    supervised = picked != ignore_index
    if reduction == "mean":
        loss = loss / _divisor(supervised.to(loss.dtype) if loss_weight is None else _masked(picked_weight, supervised))
    return _with_stats(loss, statistics, supervised, return_stats)


def _kept_bytes(hidden, rows, softcap, backend):
    """Bytes of one kept logit gradient, if those of `rows` rows are no larger than a float32 gradient of weight, whose place they take;
    or 0."""
    if backend in ("reference", "torch"):
        return 0
    size = hidden.element_size() if backend == "triton" else _logit_chunks.logit_bytes(hidden, softcap)
    return size if rows * size <= 4 * hidden.shape[1] else 0


# ------------------------------------------------------------------------------------------------------------------------------ flat ops


def _loss_impl(hidden, weight, rows, labels, loss_weight, ignore_index, softcap, z_loss, label_smoothing, needs, keep):
    """Sum of the losses of `rows`, their statistics and, unscaled and in float32, the gradients that `needs` asks for; or, with `keep`, the
    bytes of each (`_kept_bytes`), an empty tensor and the gradients of the logits."""
    _logit_chunks.check_labels(labels, rows, ignore_index, weight.shape[0])
    backend = backends.choose("linear_cross_entropy", hidden)
    if backend == "triton":
        loss, statistics, grad_rows, grad_weight = _loss_fake(
            hidden, weight, rows, labels, loss_weight, ignore_index, softcap, z_loss, label_smoothing, needs, keep
        )
        _triton().loss_pass(
            hidden, weight, rows, labels, loss_weight, ignore_index, softcap, z_loss, label_smoothing, needs, statistics.zero_(), grad_rows,
            grad_weight, keep,
        )  # fmt: skip
        supervised = labels != ignore_index
        row_loss = torch.where(supervised, _row_loss(statistics, weight.shape[0], z_loss, label_smoothing), 0.0)
        loss.copy_((row_loss if loss_weight is None else row_loss * _masked(loss_weight, supervised)).sum())
        return loss, statistics, grad_rows, grad_weight
    kept = (labels != ignore_index).nonzero().squeeze(1)
    picked, labels = rows[kept], labels[kept]
    weight_R = None if loss_weight is None else loss_weight[kept]
    options = {"row_weight": weight_R, "smoothing": label_smoothing, "z_loss": z_loss, "needs": needs}
    if backend != "native" and keep:
        raise RuntimeError(f"{backend} cannot keep the gradients of the logits; the backend changed inside a call")
    if backend == "reference":
        found, grads = _reference_pass(hidden, weight, picked, labels, weight_R, softcap, z_loss, label_smoothing, needs)
    elif backend == "torch":
        found, *grads = _common.run_reference(_loss_path.visit, hidden, weight, picked, labels, softcap, **options)
    else:
        found = torch.empty(5, kept.shape[0], dtype=torch.float32)
        grads = _logit_chunks.run_native(hidden, weight, picked, labels, softcap, found, **options, keep=keep)
    row_loss = _row_loss(found, weight.shape[0], z_loss, label_smoothing)
    loss = (row_loss if weight_R is None else row_loss * weight_R).sum()
    statistics = found.new_zeros(5, rows.shape[0]).index_copy_(1, kept, found)
    if keep:
        return loss, statistics, _common.absent(hidden), _spread(grads, kept, rows)
    return loss, statistics, _spread(grads[0], kept, rows) if needs[0] else grads[0], grads[1]


def _spread(values_KN, kept, rows):
    """The values of the rows that were computed, zeros for the rest."""
    if kept.shape[0] == rows.shape[0]:
        return values_KN
    return values_KN.new_zeros(rows.shape[0], values_KN.shape[1]).index_copy_(0, kept, values_KN)


def _triton():
    from longvita_kernels.triton import linear_cross_entropy

    return linear_cross_entropy


def _reference_pass(hidden, weight, rows, labels, loss_weight, softcap, z_loss, label_smoothing, needs):
    """What `run_native` does, by autograd through the definition. → statistics, (gradient of the rows, of weight)."""
    dtype = _common.compute_dtype(hidden)

    def definition(hidden_RH, weight_VH):
        statistics = _statistics(hidden_RH @ weight_VH.T, labels, softcap)
        loss = _row_loss(statistics, weight_VH.shape[0], z_loss, label_smoothing)
        return (loss if loss_weight is None else loss * loss_weight).sum(), statistics

    inputs = (hidden[rows].to(dtype), weight.to(dtype))
    _, statistics = _common.run_reference(definition, *inputs)
    return statistics, _common.reference_gradients(definition, inputs, needs, (statistics.new_ones(()), None))


def _loss_fake(hidden, weight, rows, labels, loss_weight, ignore_index, softcap, z_loss, label_smoothing, needs, keep):
    dtype = _common.compute_dtype(hidden)
    if keep:
        grads = _common.absent(hidden), hidden.new_empty(rows.shape[0], weight.shape[0], dtype=_logit_chunks.kept_dtype(keep))
    else:
        sizes = zip((rows.shape[0], weight.shape[0]), needs, strict=True)
        grads = (hidden.new_empty(size, hidden.shape[1], dtype=dtype) if need else _common.absent(hidden) for size, need in sizes)
    return hidden.new_empty((), dtype=dtype), hidden.new_empty(5, rows.shape[0], dtype=dtype), *grads


def _loss_setup_context(ctx, inputs, output):
    hidden, weight, rows = inputs[:3]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, rows, *output[1:])
    ctx.needs, ctx.keep = inputs[-2:]


def _loss_backward(ctx, grad, *unused):
    if grad is None:
        return (None,) * 11
    grads = _common.call(_loss_grad, _loss_grad_impl, (grad, *ctx.saved_tensors), ctx.needs, ctx.keep)
    return *(g if need else None for g, need in zip(grads, ctx.needs, strict=True)), *(None,) * 9


def _loss_grad_impl(grad, hidden, weight, rows, statistics, grad_rows, grad_weight, needs, keep):
    """Scale, round once, and put the rows where they belong; with `keep`, `grad_weight` holds the gradients of the logits."""
    backend = backends.choose("linear_cross_entropy", hidden)
    if keep and backend == "triton":
        return _triton().finish(grad, hidden, weight, rows, statistics, grad_weight, needs)
    if keep:
        return _logit_chunks.finish(hidden, weight, rows, grad_weight, grad, needs)
    out_hidden, out_weight = _common.absent(hidden), _common.absent(hidden)
    if needs[0] and backend == "triton":
        out_hidden = _triton().scaled_rows(grad, hidden, rows, statistics, grad_rows)  # never reads what is not supervised
    elif needs[0]:
        out_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        out_hidden.index_copy_(0, rows, _scaled(grad_rows, grad, hidden.dtype))
    if needs[1]:
        out_weight = _scaled(grad_weight, grad, weight.dtype)
    return out_hidden, out_weight


def _scaled(values_NH, factor, dtype):
    """values · factor, rounded once."""
    if values_NH.dtype == dtype:
        return values_NH * factor
    if backends.choose("linear_cross_entropy", values_NH) == "native":
        return _logit_chunks.scaled(values_NH, factor, dtype)
    out = values_NH.new_empty(values_NH.shape, dtype=dtype)
    return torch.mul(values_NH, factor, out=out)  # on a GPU one kernel, without the product in float32


def _input_grads_fake(hidden, weight, needs):
    return tuple(x.new_empty(x.shape) if need else _common.absent(x) for x, need in zip((hidden, weight), needs, strict=True))


def _loss_grad_fake(grad, hidden, weight, rows, statistics, grad_rows, grad_weight, needs, keep):
    return _input_grads_fake(hidden, weight, needs)


def _rows_impl(hidden, weight, labels, ignore_index, softcap, vocab_start, vocab_size):
    """Statistics (5, T) of the supervised rows, 0 elsewhere."""
    _logit_chunks.check_labels(labels, None, ignore_index, vocab_size)
    backend = backends.choose("linear_cross_entropy", hidden)
    if backend == "triton":
        return _triton().rows_statistics(hidden, weight, labels, ignore_index, softcap, vocab_start)
    rows = (labels != ignore_index).nonzero().squeeze(1)
    local = labels[rows] - vocab_start
    if backend == "reference":
        dtype = _common.compute_dtype(hidden)
        found = _common.run_reference(lambda h, w: _statistics(h.to(dtype) @ w.to(dtype).T, local, softcap), hidden[rows], weight)
    elif backend == "torch":
        found, *_ = _common.run_reference(_loss_path.visit, hidden, weight, rows, local, softcap)
    else:
        found = torch.empty(5, rows.shape[0], dtype=torch.float32)
        _logit_chunks.run_native(hidden, weight, rows, local, softcap, found)
    return found.new_zeros(5, labels.shape[0]).index_copy_(1, rows, found)


def _rows_fake(hidden, weight, labels, ignore_index, softcap, vocab_start, vocab_size):
    return hidden.new_empty(5, labels.shape[0], dtype=_common.compute_dtype(hidden))


def _rows_setup_context(ctx, inputs, output):
    hidden, weight, labels, *ctx.options, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, labels, output)


def _rows_backward(ctx, grad):
    needs = list(ctx.needs_input_grad[:2])
    if grad is None:
        return (None,) * 7
    grads = _common.call(_rows_grad, _rows_grad_impl, (grad, *ctx.saved_tensors), *ctx.options, needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 5


def _rows_grad_impl(grad, hidden, weight, labels, statistics, ignore_index, softcap, vocab_start, needs):
    """Makes the logits again, with the gradients of lse, target and sum as coefficients (the maximum has none)."""
    backend = backends.choose("linear_cross_entropy", hidden)
    if backend == "triton":
        return _triton().rows_gradient(grad, hidden, weight, labels, statistics, ignore_index, softcap, vocab_start, needs)
    rows = (labels != ignore_index).nonzero().squeeze(1)
    local = labels[rows] - vocab_start
    coefficients = grad[:3, rows].contiguous()
    if backend == "reference":
        dtype = _common.compute_dtype(hidden)

        def definition(hidden_RH, weight_VH):
            return _statistics(hidden_RH @ weight_VH.T, local, softcap)[:3]

        grads = _common.reference_gradients(definition, (hidden[rows].to(dtype), weight.to(dtype)), needs, (coefficients,))
    elif backend == "torch":
        arguments = (rows, local, softcap, statistics[:, rows], coefficients, needs)
        grads = _common.run_reference(_loss_path.visit_again, hidden, weight, *arguments)
    else:
        found = statistics[:, rows].contiguous()
        grads = _logit_chunks.run_again(hidden, weight, rows, local, softcap, found, coefficients, needs)
    grad_hidden, grad_weight = _common.absent(hidden), _common.absent(weight)
    if needs[0]:
        grad_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        grad_hidden.index_copy_(0, rows, grads[0].to(hidden.dtype))
    if needs[1]:
        grad_weight = grads[1].to(weight.dtype)
    return grad_hidden, grad_weight


def _rows_grad_fake(grad, hidden, weight, labels, statistics, ignore_index, softcap, vocab_start, needs):
    return _input_grads_fake(hidden, weight, needs)


_INPUTS = "Tensor hidden, Tensor weight"
_OPTIONS = "int ignore_index, float softcap"
_loss_grad = _common.define_op(
    "linear_cross_entropy_backward",
    f"(Tensor grad, {_INPUTS}, Tensor rows, Tensor statistics, Tensor grad_rows, Tensor grad_weight, bool[2] needs, int keep) "
    "-> (Tensor, Tensor)",
    _loss_grad_impl, _loss_grad_fake,
)  # fmt: skip
_loss = _common.define_op(
    "linear_cross_entropy",
    f"({_INPUTS}, Tensor rows, Tensor labels, Tensor? loss_weight, {_OPTIONS}, float z_loss, float label_smoothing, bool[2] needs, "
    "int keep) -> (Tensor, Tensor, Tensor, Tensor)",
    _loss_impl, _loss_fake, backward=_loss_backward, setup_context=_loss_setup_context,
)  # fmt: skip
_rows_grad = _common.define_op(
    "linear_cross_entropy_rows_backward",
    f"(Tensor grad, {_INPUTS}, Tensor labels, Tensor statistics, {_OPTIONS}, SymInt vocab_start, bool[2] needs) -> (Tensor, Tensor)",
    _rows_grad_impl, _rows_grad_fake,
)  # fmt: skip
_rows = _common.define_op(
    "linear_cross_entropy_rows",
    f"({_INPUTS}, Tensor labels, {_OPTIONS}, SymInt vocab_start, SymInt vocab_size) -> Tensor",
    _rows_impl, _rows_fake, backward=_rows_backward, setup_context=_rows_setup_context,
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------------------- spec


def _samples(dtype, device, seed):
    generator = torch.Generator().manual_seed(seed)

    def make(label, tokens, width, vocab, *, supervised=1.0, strided=False, weighted=False, **options):
        wide = width + (3 if strided else 0)
        hidden = torch.randn(tokens, wide, generator=generator).to(device, dtype)[:, :width]
        weight = (2.0 * torch.randn(vocab, wide, generator=generator) / width**0.5).to(device, dtype)[:, :width]
        labels = torch.randint(vocab, (tokens,), generator=generator)
        labels[torch.rand(tokens, generator=generator) >= supervised] = options.get("ignore_index", -100)
        if weighted:
            options["loss_weight"] = torch.rand(tokens, generator=generator).to(device)
        return SampleInput(label, (hidden, weight, labels.to(device)), options, ("hidden", "weight"))

    yield make("every row supervised", 29, 40, 83)
    yield make("mean over some rows, several blocks", 331, 65, 523, supervised=0.8, reduction="mean")
    yield make("loss of each row, strided views", 37, 48, 131, supervised=0.7, strided=True, reduction="none")
    yield make("all options", 43, 32, 301, supervised=0.8, weighted=True, softcap=5.0, z_loss=0.01, label_smoothing=0.1, ignore_index=0)
    yield make("all options, each row", 31, 24, 67, weighted=True, reduction="none", softcap=3.0, z_loss=0.02, label_smoothing=0.2)
    again = {"softcap": 4.0, "z_loss": 0.01, "label_smoothing": 0.1, "low_memory": True}
    yield make("logits made again, several blocks", 300, 24, 1100, supervised=0.9, reduction="none", **again)
    yield make("logits made again, sum", 23, 24, 70, supervised=0.9, **again)
    yield make("weighted mean", 19, 17, 41, weighted=True, strided=True, reduction="mean", z_loss=0.1)
    yield make("one row", 1, 16, 37)
    yield make("few rows, softcap", 9, 48, 71, softcap=4.0)
    yield make("a vocabulary of one", 13, 16, 1, z_loss=0.1, reduction="none")
    yield make("nothing supervised", 11, 16, 37, supervised=0.0, reduction="mean")
    yield make("nothing supervised, each row", 11, 16, 37, supervised=0.0, reduction="none")
    yield make("nothing supervised, logits made again", 11, 16, 37, supervised=0.0, low_memory=True)
    yield make("no rows", 0, 16, 37)
    yield make("no rows, each row", 0, 16, 37, reduction="none")


def _supervised(sample):
    return int((sample.args[2] != sample.kwargs.get("ignore_index", -100)).sum())


def _bytes(sample):
    hidden, weight, labels = sample.args
    return nbytes(weight, labels) + _supervised(sample) * hidden.shape[1] * hidden.element_size()


def _flops(sample):
    return 2 * _supervised(sample) * sample.args[1].numel()


def _flat_calls(sample):
    hidden, weight, labels = sample.args
    options = [sample.kwargs.get("ignore_index", -100), sample.kwargs.get("softcap", 0.0)]
    rows, needs = torch.arange(labels.shape[0]), [True, True]
    for keep in {0, _kept_bytes(hidden, 0, options[1], backends.choose("linear_cross_entropy", hidden))}:
        loss_args = (hidden, weight, rows, labels, sample.kwargs.get("loss_weight"), *options, 0.01, 0.1, needs, keep)
        yield _loss, loss_args
        yield _loss_grad, (torch.tensor(0.5), hidden, weight, rows, *_loss(*loss_args)[1:], needs, keep)
    yield _rows, (hidden, weight, labels, *options, 0, weight.shape[0])
    statistics = _rows(hidden, weight, labels, *options, 0, weight.shape[0])
    for needs in ([True, True], [False, True], [True, False]):
        yield _rows_grad, (torch.ones_like(statistics), hidden, weight, labels, statistics, *options, 0, needs)


SPEC = OpSpec(
    name="linear_cross_entropy", op=linear_cross_entropy, reference=reference, base=base, samples=_samples, outputs=("loss",),
    autocast=("hidden", "weight"),
    bytes=_bytes, flops=_flops, flat_calls=_flat_calls,
)  # fmt: skip
