"""What a Long-VITA model is, as numbers: frozen dataclasses, presets, JSON, and the counts that follow (parameters, FLOPs, cache bytes).

    config = longvita.presets["14b"]
    config.num_params()                        # 15083491328
    config.kv_bytes_per_token("bfloat16")      # 196608
    dataclasses.replace(config, text=dataclasses.replace(config.text, num_layers=2))

No torch in here. Numbers: Long-VITA's public configuration (InternViT-300M-448px, a two-layer projector, Qwen2.5-14B-Instruct).
"""

import dataclasses
import difflib
import json
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

BITS = {"float64": 64, "float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "float8_e4m3fn": 8, "float8_e5m2": 8, "int4": 4}


def _positive(owner, *names):
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ValueError(f"{type(owner).__name__}.{name} must be a positive whole number, got {value!r}")


def _positive_number(owner, *names):
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"{type(owner).__name__}.{name} must be a positive number, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """InternViT: pre-norm transformer over square tiles, class token, LayerScale, fused qkv."""

    image_size: int = 448
    patch_size: int = 14
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_layers: int = 24
    num_heads: int = 16
    layer_norm_eps: float = 1e-6

    def __post_init__(self):
        _positive(self, "image_size", "patch_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
        _positive_number(self, "layer_norm_eps")
        if self.image_size % (2 * self.patch_size):
            raise ValueError(
                f"VisionConfig.image_size {self.image_size} must be a multiple of 2 × patch_size = {2 * self.patch_size}: "
                "the pixel shuffle joins 2 × 2 patches; choose the next multiple"
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(f"VisionConfig.hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")

    @property
    def grid(self) -> int:
        """Patches per side of a tile."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid**2

    @property
    def tokens_per_tile(self) -> int:
        """Rows a tile fills in the language model: the pixel shuffle joins 2 × 2 patches."""
        return (self.grid // 2) ** 2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """LayerNorm(4 · vision hidden) → Linear → GELU → Linear, both without bias."""

    hidden_size: int = 1024
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        _positive(self, "hidden_size")
        _positive_number(self, "layer_norm_eps")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Qwen2.5 decoder: RMSNorm, rotary positions, grouped-query attention with q/k/v biases, SwiGLU."""

    vocab_size: int = 152064
    hidden_size: int = 5120
    intermediate_size: int = 13824
    num_layers: int = 48
    num_heads: int = 40
    num_kv_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_position_embeddings: int = 1310720
    tie_word_embeddings: bool = False

    def __post_init__(self):
        _positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        _positive(self, "max_position_embeddings")
        _positive_number(self, "rms_norm_eps", "rope_theta")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"TextConfig.num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}: "
                "every key/value head serves the same number of query heads"
            )
        if self.head_dim % 8 or not 32 <= self.head_dim <= 256:
            raise ValueError(
                f"TextConfig.head_dim must be a multiple of 8 from 32 to 256 (what the attention ops take), got {self.head_dim}"
            )
        if not isinstance(self.tie_word_embeddings, bool):
            raise ValueError(f"TextConfig.tie_word_embeddings must be true or false, got {self.tie_word_embeddings!r}")


@dataclass(frozen=True, kw_only=True)
class TokenIds:
    """Ids of the special tokens. The defaults are the published ones; a tokenizer trained for a small model brings its own."""

    bos: int = 151643
    eos: tuple[int, ...] = (151645, 151643)
    pad: int = 151643
    im_start: int = 151644
    im_end: int = 151645
    img: int = 151665
    img_end: int = 151666
    img_context: int = 151667
    vid: int = 151668
    vid_end: int = 151669
    vid_context: int = 151670
    patch: int = 151671
    patch_end: int = 151672
    patch_context: int = 151673
    image: int = 151680
    video: int = 151681
    newline: int | None = 198

    def __post_init__(self):
        object.__setattr__(self, "eos", (self.eos,) if isinstance(self.eos, int) else tuple(self.eos))  # JSON has no tuples
        if not self.eos:
            raise ValueError("TokenIds.eos must name at least one token that ends an answer, got none")
        for item in fields(self):
            value = getattr(self, item.name)
            for token in value if item.name == "eos" else (value,):
                if not (token is None and item.name == "newline") and (isinstance(token, bool) or not isinstance(token, int) or token < 0):
                    raise ValueError(f"TokenIds.{item.name} must be a token id (a whole number from 0), got {value!r}")

    @classmethod
    def after(cls, first: int) -> "TokenIds":
        """The special tokens on consecutive ids from `first`, in the published order; nothing is said about the newline."""
        names = ["im_start", "im_end", "img", "img_end", "img_context", "vid", "vid_end", "vid_context"]
        names += ["patch", "patch_end", "patch_context"]
        names += [None] * 6  # <quad>, <ref>, <box> and their ends: nothing here reads them
        names += ["image", "video"]
        ids = {name: first + 1 + i for i, name in enumerate(names) if name}
        return cls(bos=first, pad=first, eos=(ids["im_end"], first), newline=None, **ids)


@dataclass(frozen=True, kw_only=True)
class LongVitaConfig:
    """A whole model. Immutable: derive variants with `dataclasses.replace`."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    text: TextConfig = field(default_factory=TextConfig)
    tokens: TokenIds = field(default_factory=TokenIds)
    model_type: str = "long_vita"

    def __post_init__(self):
        for item in fields(self):
            value = getattr(self, item.name)
            if not isinstance(value, item.type):
                raise ValueError(f"LongVitaConfig.{item.name} must be a {item.type.__name__}, got {type(value).__name__}")
        if self.model_type != "long_vita":
            raise ValueError(f"LongVitaConfig.model_type must be 'long_vita', got {self.model_type!r}: this is another kind of model")
        for item in fields(self.tokens):
            ids = getattr(self.tokens, item.name)
            for token in ids if isinstance(ids, tuple) else (ids,):
                if token is not None and token >= self.text.vocab_size:
                    raise ValueError(
                        f"TokenIds.{item.name} = {token} lies outside the vocabulary of {self.text.vocab_size}: "
                        "take the ids from the tokenizer that goes with this model, or raise text.vocab_size"
                    )

    # ---- JSON ----

    def to_dict(self) -> dict:
        out = dataclasses.asdict(self)
        out["tokens"]["eos"] = list(self.tokens.eos)
        return out

    @classmethod
    def from_dict(cls, data: Mapping) -> "LongVitaConfig":
        """The inverse of `to_dict`. ValueError for an unknown key (names the nearest known one) or a value that makes no model."""
        return _build(cls, data, "")

    def save(self, path: str | os.PathLike) -> None:
        """Writes JSON; a crash leaves the old file or the new one."""
        from longvita.model.checkpoint_io import atomic_write_json  # brings torch: only where it is needed

        atomic_write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "LongVitaConfig":
        """Reads a JSON file written by `save`, or one that holds such an object under the key "model" (a run's config.json)."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not valid JSON: {error}") from error
        if isinstance(data, dict) and isinstance(data.get("model"), dict):
            data = data["model"]
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    # ---- counts ----

    def num_params(self) -> int:
        """Parameters of the whole model."""
        return sum(self.params_by_part().values())

    def params_by_part(self) -> dict[str, int]:
        """Parameters of the vision tower, the projector and the language model."""
        v, p, t = self.vision, self.projector, self.text
        block = 4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size  # qkv, proj, fc1, fc2
        block += 11 * v.hidden_size + v.intermediate_size  # biases of qkv (3), proj, fc2 and fc1; two norms (4); two LayerScales
        patches = 3 * v.patch_size**2 * v.hidden_size + v.hidden_size
        vision = v.num_layers * block + patches + v.hidden_size + (v.num_patches + 1) * v.hidden_size
        shuffled = 4 * v.hidden_size
        projector = 2 * shuffled + shuffled * p.hidden_size + p.hidden_size * t.hidden_size
        q, kv = t.num_heads * t.head_dim, t.num_kv_heads * t.head_dim
        text = t.num_layers * (self._text_layer_matrices() + q + 2 * kv + 2 * t.hidden_size) + t.hidden_size
        text += t.vocab_size * t.hidden_size * (1 if t.tie_word_embeddings else 2)
        return {"vision": vision, "projector": projector, "text": text}

    def _text_layer_matrices(self) -> int:
        t = self.text
        return t.hidden_size * t.head_dim * (2 * t.num_heads + 2 * t.num_kv_heads) + 3 * t.hidden_size * t.intermediate_size

    def flops_per_token(self, seq_len: int, training: bool = False) -> float:
        """FLOPs of the language model for one token, averaged over one document of `seq_len` tokens (causal), head included.

        2 per weight of a matrix, and 4 · heads · head_dim per visible key; a multiply-add is 2. `training` counts the backward as twice the
        forward and no recomputation. Tiles are counted by `flops_per_tile`.
        """
        if seq_len < 1:
            raise ValueError(f"seq_len must be at least 1 token, got {seq_len}")
        t = self.text
        matrices = t.num_layers * self._text_layer_matrices() + t.vocab_size * t.hidden_size
        attention = t.num_layers * 4 * t.num_heads * t.head_dim * (seq_len + 1) / 2
        return (2 * matrices + attention) * (3 if training else 1)

    def flops_per_tile(self, training: bool = False) -> float:
        """FLOPs of the vision tower and the projector for one tile; `training` as in `flops_per_token`."""
        v, p = self.vision, self.projector
        rows = v.num_patches + 1
        block = rows * 2 * (4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size) + 4 * v.hidden_size * rows**2
        patches = v.num_patches * 2 * 3 * v.patch_size**2 * v.hidden_size
        projector = v.tokens_per_tile * 2 * p.hidden_size * (4 * v.hidden_size + self.text.hidden_size)
        return float(v.num_layers * block + patches + projector) * (3 if training else 1)

    def kv_bytes_per_token(self, dtype="bfloat16") -> int:
        """Bytes one token takes in the key/value cache, scales not counted. `dtype`: a torch dtype or its name, "int4" included."""
        name = str(dtype).removeprefix("torch.")
        if name not in BITS:
            raise ValueError(f"unknown cache dtype {name!r}; known: {', '.join(BITS)}")
        t = self.text
        return 2 * t.num_layers * t.num_kv_heads * t.head_dim * BITS[name] // 8


def _build(cls, data, path):
    """A dataclass from nested mappings; unknown keys are errors that name the nearest known key."""
    if not isinstance(data, Mapping):
        raise ValueError(f"config{path and ' section '}{path}: expected an object with keys, got {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    unknown = [key for key in data if key not in hints]
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), hints, n=1, cutoff=0)[0]
        raise ValueError(f"unknown config key {path + '.' if path else ''}{unknown[0]!s}; did you mean {near!r}? Known: {', '.join(hints)}")
    nested = {k: _build(hints[k], v, f"{path}.{k}" if path else k) for k, v in data.items() if dataclasses.is_dataclass(hints[k])}
    return cls(**{**data, **nested})


# tiny is what the demo trains; 1b and 7b put InternViT-300M before the sizes of Qwen2.5-0.5B and Qwen2.5-7B; 14b is Long-VITA as published.
presets: dict[str, LongVitaConfig] = {
    "tiny": LongVitaConfig(
        vision=VisionConfig(image_size=32, patch_size=4, hidden_size=64, intermediate_size=256, num_layers=2, num_heads=2),
        projector=ProjectorConfig(hidden_size=128),
        text=TextConfig(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=320,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            max_position_embeddings=16384,
        ),  # fmt: skip
        tokens=TokenIds.after(492),
    ),
    "1b": LongVitaConfig(
        text=TextConfig(
            hidden_size=896, intermediate_size=4864, num_layers=24, num_heads=14, num_kv_heads=2, head_dim=64, tie_word_embeddings=True
        ),
    ),
    "7b": LongVitaConfig(
        text=TextConfig(hidden_size=3584, intermediate_size=18944, num_layers=28, num_heads=28, num_kv_heads=4, head_dim=128),
    ),
    "14b": LongVitaConfig(),
}
