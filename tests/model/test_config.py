"""Configurations: published numbers, counts worked out by hand, JSON, error messages."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from longvita import LongVitaConfig, presets
from longvita.config import ProjectorConfig, TextConfig, TokenIds, VisionConfig
from longvita.model.long_vita import LongVita


def test_published_sizes():
    config = presets["14b"]
    assert config == LongVitaConfig()
    assert config.num_params() == 15_083_491_328
    assert config.kv_bytes_per_token("bfloat16") == 192 * 1024
    assert config.kv_bytes_per_token(torch.float8_e4m3fn) == 96 * 1024
    assert config.kv_bytes_per_token("int4") == 48 * 1024
    assert (config.vision.grid, config.vision.num_patches, config.vision.tokens_per_tile, config.vision.head_dim) == (32, 1024, 256, 64)
    assert config.tokens.eos == (151645, 151643) and config.tokens.patch_context == 151673 and config.tokens.video == 151681


@pytest.mark.parametrize("name", presets)
def test_parameter_count_is_that_of_the_module(name):
    model = LongVita(presets[name], device="meta")
    assert sum(p.numel() for p in model.parameters()) == presets[name].num_params()
    for part, count in presets[name].params_by_part().items():
        assert sum(p.numel() for p in model.part(part).values()) == count


def hand_sized():
    return LongVitaConfig(
        vision=VisionConfig(image_size=8, patch_size=2, hidden_size=8, intermediate_size=16, num_layers=1, num_heads=1),
        projector=ProjectorConfig(hidden_size=4),
        text=TextConfig(vocab_size=32, hidden_size=16, intermediate_size=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32),
        tokens=TokenIds.after(10),
    )


def test_counts_by_hand():
    config = hand_sized()
    # A decoder layer: q 16×64, k and v 16×32 each, o 64×16, and three of 16×8.
    matrices = 1024 + 2 * 512 + 1024 + 3 * 128
    # Seven tokens see 1+2+…+7 = 28 keys, 4 on average; each key costs 2 products of 2·32 FLOPs in 2 heads.
    assert config.flops_per_token(7) == 2 * (2 * matrices + 32 * 16) + 2 * 4 * (2 * 2 * 32 * 2)
    assert config.flops_per_token(7, training=True) == 3 * config.flops_per_token(7)
    assert config.kv_bytes_per_token("float32") == 2 * 2 * 32 * 4
    assert config.params_by_part()["text"] == 2 * (matrices + 64 + 32 + 32 + 2 * 16) + 16 + 2 * 32 * 16
    # A vision layer: qkv 8×24+24, proj 8×8+8, fc1 8×16+16, fc2 16×8+8, two norms, two scales; patches 12×8+8, class 8, 17 positions.
    assert config.params_by_part()["vision"] == 216 + 72 + 144 + 136 + 2 * 16 + 2 * 8 + 104 + 8 + 17 * 8
    assert config.params_by_part()["projector"] == 2 * 32 + 32 * 4 + 4 * 16
    # 17 rows through matrices of 8×24, 8×8, 8×16 and 16×8, each seeing 17; 16 patches of 12 pixels; 4 rows out.
    assert config.flops_per_tile() == 17 * 2 * 512 + 17 * 17 * 4 * 8 + 16 * 2 * 12 * 8 + 4 * 2 * (32 * 4 + 4 * 16)
    assert config.flops_per_tile(training=True) == 3 * config.flops_per_tile()


def test_flops_need_a_length():
    with pytest.raises(ValueError, match="seq_len must be at least 1 token, got 0"):
        hand_sized().flops_per_token(0)
    with pytest.raises(ValueError, match="unknown cache dtype 'int3'; known: .*bfloat16"):
        hand_sized().kv_bytes_per_token("int3")


@pytest.mark.parametrize("name", presets)
def test_json_round_trip(name, tmp_path):
    presets[name].save(tmp_path / "config.json")
    assert LongVitaConfig.load(tmp_path / "config.json") == presets[name]
    assert LongVitaConfig.from_dict(presets[name].to_dict()) == presets[name]


def test_load_reads_a_runs_config(tmp_path):
    (tmp_path / "config.json").write_text('{"recipe": {"name": "x"}, "model": {"text": {"num_layers": 3}}}')
    assert LongVitaConfig.load(tmp_path / "config.json").text.num_layers == 3


def test_tokens_after_follow_the_published_order():
    published = TokenIds()
    small = TokenIds.after(1000)
    assert small.bos == small.pad == 1000 and small.eos == (1002, 1000) and small.newline is None
    assert small.image - small.img == published.image - published.img and small.patch_end - small.img == published.patch_end - published.img


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"txt": {}}, "unknown config key txt; did you mean 'text'"),
        ({"text": {"num_layer": 3}}, "unknown config key text.num_layer; did you mean 'num_layers'"),
        ({"text": 3}, "config section text: expected an object with keys, got int"),
        ({"text": {"num_layers": 0}}, "TextConfig.num_layers must be a positive whole number, got 0"),
        ({"text": {"num_heads": 5, "num_kv_heads": 2}}, "num_heads 5 must be a multiple of num_kv_heads 2"),
        ({"text": {"head_dim": 30}}, "head_dim must be a multiple of 8 from 32 to 256"),
        ({"text": {"rope_theta": "big"}}, "TextConfig.rope_theta must be a positive number, got 'big'"),
        ({"text": {"tie_word_embeddings": 1}}, "tie_word_embeddings must be true or false"),
        ({"vision": {"image_size": 450}}, "image_size 450 must be a multiple of 2 × patch_size = 28"),
        ({"vision": {"num_heads": 3}}, "hidden_size 1024 must be a multiple of num_heads 3"),
        ({"tokens": {"eos": []}}, "eos must name at least one token"),
        ({"tokens": {"img": -1}}, "TokenIds.img must be a token id .*, got -1"),
        ({"text": {"vocab_size": 512}}, "TokenIds.bos = 151643 lies outside the vocabulary of 512"),
        ({"model_type": "llava"}, "model_type must be 'long_vita', got 'llava'"),
    ],
)
def test_errors_teach(data, message):
    with pytest.raises(ValueError, match=message):
        LongVitaConfig.from_dict(data)


def test_broken_files(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        LongVitaConfig.load(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"vision": {"depth": 3}}')
    with pytest.raises(ValueError, match="config.json: unknown config key vision.depth"):
        LongVitaConfig.load(tmp_path / "config.json")


def test_sections_are_checked_and_frozen():
    with pytest.raises(ValueError, match="LongVitaConfig.text must be a TextConfig, got dict"):
        LongVitaConfig(text={})
    with pytest.raises(dataclasses.FrozenInstanceError):
        presets["tiny"].model_type = "other"


def test_import_is_light():
    code = "import longvita, sys; longvita.presets['tiny'].num_params(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_attribute():
    import longvita

    with pytest.raises(AttributeError, match="no attribute 'lod'; it has .*load"):
        longvita.lod  # noqa: B018


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    presets["tiny"].save(path)

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr("longvita.model.checkpoint_io.os.fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        presets["1b"].save(path)
    assert LongVitaConfig.load(path) == presets["tiny"] and [item.name for item in tmp_path.iterdir()] == ["config.json"]
