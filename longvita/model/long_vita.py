"""Long-VITA: pixels and tokens in, hidden states, logits or a loss out. Everything is packed; see batch.py.

    model = LongVita(longvita.presets["tiny"]); model.init_weights(0)
    loss_sum, n_supervised = model.loss(batch)          # training
    logits = model.logits(batch)                        # (samples, vocabulary): after the last token of every sample

Shapes: T tokens, E hidden size, N tiles, P rows a tile fills, V vocabulary.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from longvita.config import LongVitaConfig
from longvita.model.attention import AttentionContext, PackedAttention, rope_tables
from longvita.model.batch import IGNORE, Batch
from longvita.model.cache import KVCache
from longvita.model.decoder import DecoderLayer, RMSNorm, run_layers
from longvita.model.projector import VisionProjection
from longvita.model.vision import VisionModel
from longvita_kernels import linear_cross_entropy, masked_lm_head

PARTS = ("vision", "projector", "text")


class Backbone(nn.Module):
    """Everything but the head, under the published names."""

    def __init__(self, config: LongVitaConfig):
        super().__init__()
        text = config.text
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(text, i) for i in range(text.num_layers))
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.vision_model = VisionModel(config.vision)
        self.vision_projection = VisionProjection(config)


class LongVita(nn.Module):
    """The whole model. Weights are uninitialised until `init_weights` or a checkpoint fills them; device="meta" takes no memory."""

    def __init__(self, config: LongVitaConfig, device=None, dtype: torch.dtype | None = None):
        super().__init__()
        if not isinstance(config, LongVitaConfig):
            raise ValueError(f"config must be a LongVitaConfig, got {type(config).__name__}; for a preset pass longvita.presets[name]")
        self.config = config
        # Built without memory first, so that the modules' own initialisation costs nothing.
        with torch.device("meta"):
            self.model = Backbone(config)
            text = config.text
            self.lm_head = None if text.tie_word_embeddings else nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        if dtype is not None:
            self.to(dtype)
        if torch.device(device or "cpu").type != "meta":
            self.to_empty(device=device or "cpu")
        self._recompute_text = False

    # ---- weights ----

    @torch.no_grad()
    def init_weights(self, seed: int = 0, std: float = 0.02) -> "LongVita":
        """Normal(0, std) for matrices, tokens, positions, class token; 0 for biases, 1 for norms and LayerScale. Same seed, same bits."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            last = name.rsplit(".", 1)[-1]
            if last == "bias":
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
        return self

    def part(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of "vision", "projector" or "text", by their full names."""
        _check_parts([name])
        prefixes = {"vision": "model.vision_model.", "projector": "model.vision_projection."}
        if name in prefixes:
            return {n: p for n, p in self.named_parameters() if n.startswith(prefixes[name])}
        return {n: p for n, p in self.named_parameters() if not n.startswith(tuple(prefixes.values()))}

    @property
    def vision(self) -> dict[str, nn.Parameter]:
        return self.part("vision")

    @property
    def projector(self) -> dict[str, nn.Parameter]:
        return self.part("projector")

    @property
    def text(self) -> dict[str, nn.Parameter]:
        return self.part("text")

    def set_trainable(self, parts: Iterable[str]) -> None:
        """Lets gradients reach these parts and no others."""
        parts = _check_parts(parts)
        for name in PARTS:
            for parameter in self.part(name).values():
                parameter.requires_grad_(name in parts)

    def set_recompute(self, parts: Iterable[str]) -> None:
        """Activation checkpointing in these parts and no others: layers keep their inputs only and run again in the backward pass."""
        parts = _check_parts(parts)
        self.model.vision_model.recompute = "vision" in parts
        self.model.vision_projection.recompute = "projector" in parts
        self._recompute_text = "text" in parts

    @property
    def head_weight(self) -> nn.Parameter:
        """(V, E): the output matrix, which is the token embedding where the two are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    # ---- forward ----

    def encode_images(self, images_N3SS: Tensor, tiles_at_once: int | None = None) -> Tensor:
        """(N, 3, S, S) → (N, P, E). A frozen vision tower builds no graph. `tiles_at_once` bounds the activations in inference."""
        vision = self.model.vision_model
        learns = torch.is_grad_enabled() and (images_N3SS.requires_grad or any(p.requires_grad for p in vision.parameters()))
        parts = []
        for tiles in images_N3SS.split(tiles_at_once or max(images_N3SS.shape[0], 1)):
            with torch.set_grad_enabled(learns):
                features = vision(tiles)
            parts.append(self.model.vision_projection(features))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def embed(self, batch: Batch, tiles_at_once: int | None = None) -> Tensor:
        """(T, E): token embeddings, with the rows named by image_indices replaced by image features."""
        x_TE = self.model.embed_tokens(batch.input_ids)
        if batch.images is None or not batch.images.shape[0]:
            return x_TE
        features_NPE = self.encode_images(batch.images, tiles_at_once)
        return x_TE.index_copy(0, batch.image_indices[1].flatten(), features_NPE.flatten(0, 1).to(x_TE.dtype))

    def decode(self, x_TE: Tensor, position_ids_T: Tensor, context: AttentionContext) -> Tensor:
        """Embedded rows through the decoder and the final norm: (T, E) → (T, E)."""
        text = self.config.text
        rope = rope_tables(position_ids_T, text.head_dim, text.rope_theta)
        return self.model.norm(run_layers(self.model.layers, x_TE, rope, context, self._recompute_text))

    def forward(self, batch: Batch, cache: KVCache | None = None) -> Tensor:
        """Hidden states (T, E) after the final norm.

        With a cache, document i of the batch continues sequence i of the cache and is appended to it. ValueError for a batch that makes no
        sense.
        """
        batch.validate(self.config)
        if cache is None:
            return self.decode(self.embed(batch), batch.position_ids, PackedAttention(batch.cu_seqlens, batch.max_seqlen))
        step = cache.begin(batch.lengths)
        hidden_TE = self.decode(self.embed(batch), batch.position_ids, step)
        step.commit()
        return hidden_TE

    def logits(self, batch: Batch, rows: Tensor | None = None) -> Tensor:
        """Logits (M, V) of the rows asked for: int64 (M,) or bool (T,); None = the last token of every sample. Cost follows M."""
        return masked_lm_head(self(batch), self.head_weight, batch.last_rows() if rows is None else rows)

    def loss(self, batch: Batch) -> tuple[Tensor, int]:
        """Sum of the next-token losses over supervised tokens (fp32 scalar), and their number. Divide by the global number to train."""
        labels_T = batch.shifted_labels()
        loss_sum = linear_cross_entropy(self(batch), self.head_weight, labels_T, ignore_index=IGNORE, reduction="sum")
        return loss_sum, int((labels_T != IGNORE).sum())


def _check_parts(parts: Iterable[str]) -> set[str]:
    parts = {parts} if isinstance(parts, str) else set(parts)
    unknown = sorted(parts - set(PARTS))
    if unknown:
        raise ValueError(f"unknown part of the model {unknown[0]!r}; parts are {', '.join(PARTS)}")
    return parts
