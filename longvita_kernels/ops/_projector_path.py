"""pixel_shuffle_projection inside torch: what a GPU runs where no kernel of ours is verified yet.

The plain composition, with a backward that keeps z instead of making it again. The shuffled patches exist here, and their LayerNorm, one
at a time. Names and shapes: ops/pixel_shuffle_projection.py. S: tokens of all tiles, W = 4C: channels of a token.
"""

import torch
import torch.nn.functional as F

from longvita_kernels.ops import _common


def _normed(x, ln_weight, ln_bias, grid, class_token, eps):
    """Shuffled patches (S, W), their LayerNorm, and what its backward needs."""
    patches_NLC = x[:, 1:] if class_token else x
    corners = patches_NLC.unflatten(1, (grid[0] // 2, 2, grid[1] // 2, 2)).transpose(2, 3)
    shuffled_SW = corners.reshape(-1, 4 * x.shape[2])
    affine = ln_weight.to(x.dtype), ln_bias.to(x.dtype)
    return shuffled_SW, affine, *torch.native_layer_norm(shuffled_SW, shuffled_SW.shape[1:], *affine, eps)


def forward(x, ln_weight, ln_bias, w1, b1, w2, b2, grid, class_token, eps):
    """y (N, R, O) and z (S, D)."""
    _, _, normed_SW, *_ = _normed(x, ln_weight, ln_bias, grid, class_token, eps)
    z_SD = F.linear(normed_SW, w1, b1)
    return F.linear(F.gelu(z_SD), w2, b2).unflatten(0, (x.shape[0], (grid[0] // 2) * (grid[1] // 2))), z_SD


def backward(grad, x, ln_weight, ln_bias, w1, b1, w2, b2, z_SD, grid, class_token, eps, needs):
    """Gradients of the seven inputs, absent where `needs` says so."""
    grads = [
        torch.zeros_like(t) if need else _common.absent(x) for t, need in zip((x, ln_weight, ln_bias, w1, b1, w2, b2), needs, strict=True)
    ]
    grad_SO = grad.flatten(0, 1)
    if grad_SO.shape[0] == 0:
        return grads
    if needs[5]:
        torch.mm(grad_SO.T, F.gelu(z_SD), out=grads[5])
    if needs[6]:
        torch.sum(grad_SO, 0, out=grads[6])
    if not any(needs[:5]):
        return grads
    dz_SD = torch.ops.aten.gelu_backward(grad_SO @ w2, z_SD)
    if needs[4]:
        torch.sum(dz_SD, 0, out=grads[4])
    if not any(needs[:4]):
        return grads
    shuffled_SW, affine, normed_SW, mean, deviation = _normed(x, ln_weight, ln_bias, grid, class_token, eps)
    if needs[3]:
        torch.mm(dz_SD.T, normed_SW, out=grads[3])
    del normed_SW
    if any(needs[:3]):
        arguments = (dz_SD @ w1, shuffled_SW, shuffled_SW.shape[1:], mean, deviation, *affine, needs[:3])
        d_shuffled, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(*arguments)
        for at, found in ((1, d_weight), (2, d_bias)):
            if needs[at]:
                grads[at].copy_(found)
        if needs[0]:
            corners = d_shuffled.view(x.shape[0], grid[0] // 2, grid[1] // 2, 2, 2, x.shape[2]).transpose(2, 3)
            patches = grads[0][:, 1:] if class_token else grads[0]
            patches.unflatten(1, (grid[0] // 2, 2, grid[1] // 2, 2)).copy_(corners)
    return grads
