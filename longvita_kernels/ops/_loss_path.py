"""linear_cross_entropy inside torch: what a GPU runs where no kernel of ours is verified yet.

Three products in the inputs' dtype with float32 sums, over the supervised rows alone, some at a time. How many there are is read back from
a GPU: without that number torch could only compute all T. Equations: ops/linear_cross_entropy.py.

R: supervised rows (of a chunk). V: rows of weight (of a chunk). H: width.
"""

import torch

from longvita_kernels.ops import _common
from longvita_kernels.ops._products import add_product, product

_LOGITS = 1 << 28  # that exist at a time, in float32, beside as many exponentials and the gradients: 2.5 GiB


def _chunks(size, other):
    """(first, last) of chunks of `size` rows or columns with `other` logits each."""
    step = max(1, min(size, _LOGITS // max(other, 1)))
    return [(first, min(first + step, size)) for first in range(0, size, step)]


def _logits(x_RH, weight_VH, softcap):
    """l (R, V), and its derivative by the product, or None where that is 1."""
    logits = product(x_RH, weight_VH.T)
    if softcap == 0.0:
        return logits, None
    tanh = logits.div_(softcap).tanh_()
    return tanh * softcap, 1.0 - tanh.square()


def _labels(labels_R, vocab):
    """Labels that can be looked up, as (R, 1), and which of them are meant."""
    here_R = (labels_R >= 0) & (labels_R < vocab)
    return torch.where(here_R, labels_R, 0).unsqueeze(1), here_R


def _gradient(exponentials_RV, slope_RV, labels_R, exp_sum_R, coefficients, dtype):
    """Gradient of the products from exp(l − largest), in its place, and the coefficients of lse, label's logit and sum; in `dtype`."""
    of_lse_R, of_target_R, of_sum_R = coefficients
    label_R1, here_R = _labels(labels_R, exponentials_RV.shape[1])
    found = torch.addcmul(of_sum_R.unsqueeze(1), exponentials_RV, (of_lse_R / exp_sum_R).unsqueeze(1), out=exponentials_RV)
    found.scatter_add_(1, label_R1, torch.where(here_R, of_target_R, 0.0).unsqueeze(1))
    return (found if slope_RV is None else found.mul_(slope_RV)).to(dtype)


def visit(hidden, weight, rows, labels, softcap, *, needs=(False, False), row_weight=None, smoothing=0.0, z_loss=0.0):
    """Statistics (5, R) of `rows` of hidden, and the gradients of the summed loss: of the rows (R, H) and of weight (V, H), float32."""
    x_RH, vocab, wide = hidden[rows], weight.shape[0], _common.compute_dtype(hidden)
    found = torch.empty(5, rows.shape[0], dtype=wide, device=hidden.device)
    grad_rows, grad_weight = (
        torch.zeros(size, hidden.shape[1], dtype=wide, device=hidden.device) if need else _common.absent(hidden)
        for size, need in zip((rows.shape[0], vocab), needs, strict=True)
    )
    factor = torch.ones_like(labels, dtype=wide) if row_weight is None else row_weight.to(wide)
    for first, last in _chunks(rows.shape[0], vocab):
        part = slice(first, last)
        logits, slope = _logits(x_RH[part], weight, softcap)
        label, here = _labels(labels[part], vocab)
        target, total, largest = torch.where(here, logits.gather(1, label).squeeze(1), 0.0), logits.sum(1), logits.amax(1)
        exponentials = logits.sub_(largest.unsqueeze(1)).exp_()
        exp_sum = exponentials.sum(1)
        lse = largest + exp_sum.log()
        torch.stack((lse, target, total, largest, exp_sum), out=found[:, part])
        if not any(needs):
            continue
        scale = factor[part]
        coefficients = scale * (1.0 + 2.0 * z_loss * lse), -scale * (1.0 - smoothing), -scale * (smoothing / vocab)
        gradient = _gradient(exponentials, slope, labels[part], exp_sum, coefficients, hidden.dtype)
        if needs[0]:
            grad_rows[part] = product(gradient, weight)
        if needs[1]:
            add_product(grad_weight, gradient.T, x_RH[part])
    return found, grad_rows, grad_weight


def visit_again(hidden, weight, rows, labels, softcap, statistics, coefficients, needs):
    """Gradients from those of the statistics (3, R) → (R, H), float32, and (V, H) in weight's dtype. Chunks are columns, so that the
    gradient of each row of weight is complete at once."""
    x_RH, wide = hidden[rows], _common.compute_dtype(hidden)
    grad_rows = torch.zeros(rows.shape[0] if needs[0] else 0, hidden.shape[1], dtype=wide, device=hidden.device)
    grad_weight = torch.zeros_like(weight) if needs[1] else _common.absent(weight)
    for first, last in _chunks(weight.shape[0], rows.shape[0]) if rows.shape[0] else ():
        part = slice(first, last)
        logits, slope = _logits(x_RH, weight[part], softcap)
        exponentials = logits.sub_(statistics[3].unsqueeze(1)).exp_()
        gradient = _gradient(exponentials, slope, labels - first, statistics[4], coefficients, hidden.dtype)
        if needs[0]:
            add_product(grad_rows, gradient, weight[part])
        if needs[1]:
            torch.mm(gradient.T, x_RH, out=grad_weight[part])
    return grad_rows, grad_weight
