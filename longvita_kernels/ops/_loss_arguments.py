"""The arguments of linear_cross_entropy: ValueError, with the remedy, for what does not fit."""

import math

import torch

from longvita_kernels.ops import _common


def check(hidden, weight, labels, ignore_index, reduction, loss_weight, softcap, z_loss, label_smoothing, vocab_start, vocab_group):
    _common.check_tensor("labels", labels, "int64")
    shape, weight_shape = hidden.shape, weight.shape
    if not (  # else what follows would find nothing
        _common.common_case(hidden, weight) and labels.dtype is torch.int64 and labels.is_cpu and len(shape) == 2
        and weight_shape == (weight_shape[0], shape[1]) and labels.shape == (shape[0],)
    ):  # fmt: skip
        _common.check_shape("hidden", hidden, (None, None), "(T, H)")
        _common.check_shape("weight", weight, (None, shape[1]), "(V, H)")
        _common.check_shape("labels", labels, (shape[0],), "(T,)")
        _common.check_float("hidden", hidden)
        _common.check_like("weight", weight, "hidden", hidden)
        _common.check_last_stride("hidden", hidden)
        _common.check_last_stride("weight", weight)
        _common.check_dtype("labels", labels, (torch.int64,))
        _common.check_device("labels", labels, "hidden", hidden)
    if weight_shape[0] == 0:
        raise ValueError("weight has 0 rows; expected (V, H) with V at least 1: the loss of an empty vocabulary has no meaning")
    if not isinstance(ignore_index, _common.INTEGERS):
        raise ValueError(f"ignore_index is {ignore_index!r}; expected an int, or None for -100")
    if reduction not in ("sum", "mean", "none"):
        raise ValueError(f"reduction is {reduction!r}; expected 'sum', 'mean' or 'none'")
    if loss_weight is not None:
        _common.check_shape("loss_weight", loss_weight, (hidden.shape[0],), "(T,)")
        _common.check_float("loss_weight", loss_weight)
        _common.check_device("loss_weight", loss_weight, "hidden", hidden)
        if reduction == "mean" and not _common.is_traced(loss_weight, labels) and _common.checks_values(loss_weight):
            _check_mean_weights(loss_weight, labels, ignore_index)
    if not 0.0 <= softcap < math.inf or not 0.0 <= z_loss < math.inf or not 0.0 <= label_smoothing < 1.0:
        raise ValueError(
            f"softcap is {softcap}, z_loss {z_loss}, label_smoothing {label_smoothing}; expected softcap ≥ 0, z_loss ≥ 0, both finite, and "
            "0 ≤ label_smoothing < 1, where 0 turns each off"
        )
    if vocab_group is None and vocab_start != 0:
        raise ValueError(f"vocab_start is {vocab_start} without vocab_group; pass the torch.distributed group that has the rest of weight")


def _check_mean_weights(loss_weight, labels, ignore_index):
    """A mean divides by their sum, which means nothing where they cancel."""
    bad = (loss_weight.detach() < 0) & (labels != ignore_index)
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"loss_weight[{at}] is {float(loss_weight[at])}; expected weights of at least 0 with reduction='mean', which divides by their "
            "sum. Remedy: reduction='sum', divided by what you mean (the number of tokens, say)"
        )
