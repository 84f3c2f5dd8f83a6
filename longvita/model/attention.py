"""What a query may look at, decided once per forward pass and shared by all layers.

The decoder only calls `attend(layer, q, k, v)`. `PackedAttention` serves training and whole prompts, `CachedAttention` generation.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from longvita_kernels import varlen_attention


class AttentionContext(Protocol):
    def attend(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """q (T, heads, D), k and v (T, kv_heads, D), rotated → (T, heads, D)."""


@dataclass(frozen=True)
class PackedAttention:
    """Causal attention within every document of a packed batch."""

    cu_seqlens: Tensor
    max_seqlen: int

    def attend(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        return varlen_attention(q_THD, k_TKD, v_TKD, self.cu_seqlens, max_seqlen_q=self.max_seqlen, max_seqlen_k=self.max_seqlen)


def rope_tables(position_ids_T: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and signed sin (T, 1, head_dim) in fp32 for `apply_rope`, with the frequencies theta^(-2i / head_dim)."""
    powers = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids_T.device) / head_dim
    angles_TF = torch.outer(position_ids_T.float(), 1.0 / theta**powers)
    cos_TF, sin_TF = angles_TF.cos(), angles_TF.sin()
    return torch.cat([cos_TF, cos_TF], dim=-1)[:, None], torch.cat([-sin_TF, sin_TF], dim=-1)[:, None]


def apply_rope(x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """Rotates the pairs (i, i + D/2) of every head, in fp32, and returns x's dtype. An angle of 10^6 in bf16 would be off by thousands."""
    x32 = x_THD.float()
    return (x32 * cos_T1D + x32.roll(x32.shape[-1] // 2, dims=-1) * sin_T1D).to(x_THD.dtype)
