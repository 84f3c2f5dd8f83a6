"""The vision tower against transformers' InternVL, other image sizes, the projector against its definition."""

import pytest
import torch
import torch.nn.functional as F
import transformers

from longvita import LongVita, presets
from longvita.model.vision import VisionModel

VISION = presets["tiny"].vision


def spread(module):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(0.5 if parameter.dim() == 1 else 0.0, 0.2, generator=generator))
    return module


@pytest.fixture(scope="module")
def tower():
    return spread(VisionModel(VISION))


def to_internvl(name, tensor):
    """Our (published) name → [(transformers' name, tensor)]."""
    for ours, theirs in (
        ("class_embedding", "cls_token"), ("position_embedding", "position_embeddings"), ("patch_embedding", "patch_embeddings.projection"),
        ("encoder.layers.", "encoder.layer."), ("ls1", "lambda_1"), ("ls2", "lambda_2"), ("norm1", "layernorm_before"),
        ("norm2", "layernorm_after"), ("attn.proj.", "attention.projection_layer."), ("attn.qkv.", "attention.{}_proj."),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    if "{}" in name:
        return [(name.format(part), rows) for part, rows in zip("qkv", tensor.chunk(3), strict=True)]
    return [(name, tensor)]


@pytest.fixture(scope="module")
def internvl(tower):
    config = transformers.InternVLVisionConfig(
        hidden_size=VISION.hidden_size, intermediate_size=VISION.intermediate_size, num_hidden_layers=VISION.num_layers,
        num_attention_heads=VISION.num_heads, image_size=VISION.image_size, patch_size=VISION.patch_size, attention_bias=True,
        layer_norm_eps=VISION.layer_norm_eps,
    )  # fmt: skip
    model = transformers.InternVLVisionModel(config).eval()
    mapped = dict(pair for name, tensor in tower.state_dict().items() for pair in to_internvl(name, tensor))
    model.load_state_dict(mapped, strict=True)  # strict: the map is total
    return model


@torch.no_grad()
@pytest.mark.parametrize("size", [32, 16, 48])
def test_features_equal_internvl(tower, internvl, size):
    images = torch.randn(3, 3, size, size)
    expected = internvl(images).last_hidden_state
    features = tower(images)
    assert features.shape == (3, 1 + (size // 4) ** 2, VISION.hidden_size) and expected.std() > 0.5
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_tiles_do_not_depend_on_each_other(tower):
    images = torch.randn(3, 3, 32, 32)
    together = tower(images)
    changed = tower(torch.cat([images[:1], torch.randn(1, 3, 32, 32), images[2:]]))
    assert torch.equal(together[[0, 2]], changed[[0, 2]]) and not torch.equal(together[1], changed[1])


@torch.no_grad()
def test_positions_are_resampled_in_fp32(tower):
    expected = tower.embeddings.positions(12)
    lowered = VisionModel(VISION).to(torch.bfloat16)
    lowered.load_state_dict(tower.state_dict())
    positions = lowered.embeddings.positions(12)
    assert positions.shape == (1, 145, VISION.hidden_size) and positions.dtype == torch.bfloat16
    in_fp32 = VisionModel(VISION)
    in_fp32.load_state_dict(lowered.state_dict())
    assert torch.equal(positions, in_fp32.embeddings.positions(12).bfloat16())
    assert torch.equal(expected[:, :1], tower.embeddings.position_embedding[:, :1])
    assert torch.equal(tower.embeddings.positions(8), tower.embeddings.position_embedding)


def test_projector_equals_its_definition():
    projection = spread(LongVita(presets["tiny"])).model.vision_projection
    x_NLC = torch.randn(2, 65, 64)
    shuffled = torch.empty(2, 16, 256)
    for row in range(4):
        for column in range(4):
            for part in range(4):  # the four patches of a 2 × 2 square, row by row
                patch = 1 + (2 * row + part // 2) * 8 + 2 * column + part % 2
                shuffled[:, row * 4 + column, part * 64 : (part + 1) * 64] = x_NLC[:, patch]
    norm = projection.pre_proj_layernorm
    normed = F.layer_norm(shuffled, (256,), norm.weight, norm.bias, 1e-5)
    expected = F.gelu(normed @ projection.mlp[0].weight.T) @ projection.mlp[2].weight.T
    torch.testing.assert_close(projection(x_NLC), expected, rtol=1e-4, atol=1e-4)
