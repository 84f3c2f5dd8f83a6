"""The Qwen2.5 decoder over packed tokens: pre-norm blocks of grouped-query attention and SwiGLU, with the published parameter names.

Shapes: T tokens, E hidden size, H query heads, K key/value heads, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longvita.config import TextConfig
from longvita.model.attention import AttentionContext, apply_rope


class RMSNorm(nn.Module):
    """weight · x / sqrt(mean(x²) + eps) along the last dimension, in fp32 whatever x is."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size)
        self.k_proj = nn.Linear(config.hidden_size, kv_size)
        self.v_proj = nn.Linear(config.hidden_size, kv_size)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def forward(self, x_TE: Tensor, rope: tuple[Tensor, Tensor], context: AttentionContext) -> Tensor:
        heads = (-1, self.head_dim)
        q_THD = apply_rope(self.q_proj(x_TE).unflatten(1, heads), *rope)
        k_TKD = apply_rope(self.k_proj(x_TE).unflatten(1, heads), *rope)
        v_TKD = self.v_proj(x_TE).unflatten(1, heads)
        return self.o_proj(context.attend(self.layer, q_THD, k_TKD, v_TKD).flatten(1))


class MLP(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_TE: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TE)) * self.up_proj(x_TE))


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_TE: Tensor, rope: tuple[Tensor, Tensor], context: AttentionContext) -> Tensor:
        x_TE = x_TE + self.self_attn(self.input_layernorm(x_TE), rope, context)
        return x_TE + self.mlp(self.post_attention_layernorm(x_TE))


def run_layers(layers: nn.ModuleList, x_TE: Tensor, rope, context: AttentionContext, recompute: bool) -> Tensor:
    """Through every layer; with `recompute`, only the input of each layer is kept for the backward pass."""
    for layer in layers:
        if recompute and torch.is_grad_enabled():
            x_TE = checkpoint(layer, x_TE, rope, context, use_reentrant=False)
        else:
            x_TE = layer(x_TE, rope, context)
    return x_TE
