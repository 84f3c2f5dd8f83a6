"""From the vision tower's patches to rows of the language model: pixel shuffle by 2 × 2, LayerNorm, Linear, exact GELU, Linear (no biases).

The modules hold the weights under their published names; the arithmetic is one op that reads the patches where they lie.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longvita.config import LongVitaConfig
from longvita_kernels import pixel_shuffle_projection


class VisionProjection(nn.Module):
    def __init__(self, config: LongVitaConfig):
        super().__init__()
        shuffled = 4 * config.vision.hidden_size
        self.pre_proj_layernorm = nn.LayerNorm(shuffled, config.projector.layer_norm_eps)
        self.mlp = nn.Sequential(
            nn.Linear(shuffled, config.projector.hidden_size, bias=False),
            nn.GELU(),
            nn.Linear(config.projector.hidden_size, config.text.hidden_size, bias=False),
        )
        self.recompute = False

    def forward(self, x_NLC: Tensor) -> Tensor:
        """(N, 1 + G·G, C), class token first → (N, (G/2)², text hidden size)."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._project, x_NLC, use_reentrant=False)
        return self._project(x_NLC)

    def _project(self, x_NLC: Tensor) -> Tensor:
        grid = round((x_NLC.shape[1] - 1) ** 0.5)
        norm = self.pre_proj_layernorm
        return pixel_shuffle_projection(
            x_NLC, norm.weight, norm.bias, self.mlp[0].weight, self.mlp[2].weight, grid=(grid, grid), class_token=True, eps=norm.eps
        )
