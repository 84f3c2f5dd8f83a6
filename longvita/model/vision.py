"""InternViT over packed tiles.

    x = [class, patches] + positions;   x += ls1 · attention(norm1(x));   x += ls2 · mlp(norm2(x));   no norm at the end

All tiles of a batch run as one packed sequence of N documents, so no batch dimension is needed and tiles of any number cost one call.
Names and arithmetic equal the published InternViT-300M-448px (fused qkv with rows ordered q, k, v; exact GELU; LayerScale).

Shapes: N tiles, S pixels per side, G patches per side, L = 1 + G·G rows of a tile, R = N·L, C hidden size, H heads, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longvita.config import VisionConfig
from longvita_kernels import varlen_attention


class VisionEmbeddings(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.grid = config.grid
        self.class_embedding = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.position_embedding = nn.Parameter(torch.empty(1, config.num_patches + 1, config.hidden_size))

    def forward(self, images_N3SS: Tensor) -> Tensor:
        """(N, 3, S, S) → (N, L, C)."""
        tiles, grid, patch = images_N3SS.shape[0], images_N3SS.shape[-1] // self.patch_size, self.patch_size
        weight = self.patch_embedding.weight
        # Kernel = stride: the convolution is one matmul over the pixels of each patch.
        patches = images_N3SS.to(weight.dtype).reshape(tiles, 3, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
        patches_NPC = F.linear(patches.reshape(tiles, grid * grid, -1), weight.flatten(1), self.patch_embedding.bias)
        classes_N1C = self.class_embedding.to(patches_NPC.dtype).expand(tiles, 1, -1)
        return torch.cat([classes_N1C, patches_NPC], dim=1) + self.positions(grid).to(patches_NPC.dtype)

    def positions(self, grid: int) -> Tensor:
        """(1, 1 + grid², C): the learned positions, resampled (bicubic, fp32) when the tile has another size than the learned one."""
        if grid == self.grid:
            return self.position_embedding
        learned = self.position_embedding[:, 1:].float().unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        resampled = F.interpolate(learned, size=(grid, grid), mode="bicubic", align_corners=False)
        resampled = resampled.flatten(2).transpose(1, 2).to(self.position_embedding.dtype)
        return torch.cat([self.position_embedding[:, :1], resampled], dim=1)


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_RC: Tensor, cu_seqlens: Tensor, rows_per_tile: int) -> Tensor:
        q_RHD, k_RHD, v_RHD = self.qkv(x_RC).view(-1, 3, self.num_heads, self.head_dim).unbind(1)  # views, never copies
        out = varlen_attention(q_RHD, k_RHD, v_RHD, cu_seqlens, max_seqlen_q=rows_per_tile, max_seqlen_k=rows_per_tile, causal=False)
        return self.proj(out.flatten(1))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_RC: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_RC)))


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.ls1 = nn.Parameter(torch.empty(config.hidden_size))
        self.ls2 = nn.Parameter(torch.empty(config.hidden_size))
        self.norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(config)

    def forward(self, x_RC: Tensor, cu_seqlens: Tensor, rows_per_tile: int) -> Tensor:
        x_RC = torch.addcmul(x_RC, self.attn(self.norm1(x_RC), cu_seqlens, rows_per_tile), self.ls1)
        return torch.addcmul(x_RC, self.mlp(self.norm2(x_RC)), self.ls2)


class VisionEncoder(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_layers))


class VisionModel(nn.Module):
    """(N, 3, S, S) pixels → (N, 1 + patches, C), class token first. S may be any multiple of 2 × patch_size."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config)
        self.recompute = False

    def forward(self, images_N3SS: Tensor) -> Tensor:
        x_NLC = self.embeddings(images_N3SS)
        tiles, rows_per_tile = x_NLC.shape[:2]
        cu_seqlens = torch.arange(tiles + 1, dtype=torch.int32, device=x_NLC.device) * rows_per_tile
        x_RC = x_NLC.flatten(0, 1)
        for layer in self.encoder.layers:
            if self.recompute and torch.is_grad_enabled():
                x_RC = checkpoint(layer, x_RC, cu_seqlens, rows_per_tile, use_reentrant=False)
            else:
                x_RC = layer(x_RC, cu_seqlens, rows_per_tile)
        return x_RC.view(tiles, rows_per_tile, -1)
