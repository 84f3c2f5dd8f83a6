"""The decoder against transformers' Qwen2, packed documents against separate ones, rotary positions, isolation."""

import dataclasses

import pytest
import torch
import transformers

from longvita import Batch, LongVita, presets
from longvita.model.attention import PackedAttention, apply_rope, rope_tables

TINY = presets["tiny"]


def spread(model, std=0.15):
    """Random weights large enough that every part matters and logits differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(1.0 if parameter.dim() == 1 else 0.0, std, generator=generator))
    return model


def documents(*lengths):
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, TINY.text.vocab_size, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def qwen():
    text = TINY.text
    config = transformers.Qwen2Config(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_layers,
        num_attention_heads=text.num_heads,
        num_key_value_heads=text.num_kv_heads,
        head_dim=text.head_dim,
        rms_norm_eps=text.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
        max_position_embeddings=text.max_position_embeddings,
        tie_word_embeddings=False,
    )
    return spread(transformers.Qwen2ForCausalLM(config).eval())


@pytest.fixture(scope="module")
def model(qwen):
    model = spread(LongVita(TINY))
    result = model.load_state_dict(qwen.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all(name.startswith("model.vision_") for name in result.missing_keys)
    return model


@torch.no_grad()
def test_logits_equal_qwen2(qwen, model):
    [ids] = documents(48)
    expected = qwen(torch.tensor([ids])).logits[0]
    logits = model.logits(Batch.from_ids([ids]), rows=torch.arange(48))
    assert expected.std() > 1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_positions_equal_qwen2(qwen, model):
    [ids] = documents(20)
    positions = torch.arange(20) * 37 + 5000
    expected = qwen(torch.tensor([ids]), position_ids=positions[None]).logits[0]
    batch = dataclasses.replace(Batch.from_ids([ids]), position_ids=positions)
    torch.testing.assert_close(model.logits(batch, rows=torch.arange(20)), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_packed_documents_equal_separate_runs_of_qwen2(qwen, model):
    packed = documents(17, 1, 30)
    logits = model.logits(Batch.from_ids(packed), rows=torch.ones(48, dtype=torch.bool))
    expected = torch.cat([qwen(torch.tensor([ids])).logits[0] for ids in packed])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_default_rows_are_the_last_of_every_sample(model):
    batch = Batch.from_ids(documents(5, 0, 9))
    torch.testing.assert_close(model.logits(batch), model.logits(batch, rows=torch.tensor([4, 13])), rtol=0, atol=0)


@torch.no_grad()
def test_weights_round_trip_to_qwen2(qwen, model):
    ours = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("model.vision_")}
    theirs = qwen.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_one_document_never_touches_another(model):
    first, other, second = documents(23, 23, 31)
    x_TE = model.embed(Batch.from_ids([first, second])).detach()
    positions, cu_seqlens = torch.cat([torch.arange(23), torch.arange(31)]), torch.tensor([0, 23, 54], dtype=torch.int32)

    def second_half(x_TE):
        x_TE = x_TE.clone().requires_grad_()
        hidden = model.decode(x_TE, positions, PackedAttention(cu_seqlens, 31))
        hidden[23:].square().sum().backward()
        return hidden[23:].detach(), x_TE.grad

    changed = torch.cat([model.embed(Batch.from_ids([other])).detach(), x_TE[23:]])
    hidden, gradient = second_half(x_TE)
    hidden_changed, gradient_changed = second_half(changed)
    assert torch.equal(hidden, hidden_changed) and torch.equal(gradient[23:], gradient_changed[23:])
    assert not gradient[:23].any() and not gradient_changed[:23].any()
    assert gradient[23:].abs().min() > 0


@torch.no_grad()
def test_joined_documents_see_each_other(model):
    batch = Batch.from_ids(documents(10, 12))
    joined = dataclasses.replace(batch, cu_seqlens=torch.tensor([0, 22], dtype=torch.int32), position_ids=torch.arange(22))
    reset, run_on = model(batch), model(joined)
    torch.testing.assert_close(run_on[:10], reset[:10], rtol=1e-4, atol=1e-5)  # what comes first sees the same
    assert (run_on[10:] - reset[10:]).abs().max() > 0.1
    whole = Batch.from_ids([batch.input_ids.tolist()])
    assert torch.equal(model(whole), run_on)


def test_rope_turns_pairs_by_position_times_frequency():
    x = torch.zeros(3, 1, 4)
    x[:, 0, 0] = 1.0  # the first of pair 0, frequency 1
    x[:, 0, 3] = 2.0  # the second of pair 1, frequency 100^(-1/2) = 0.1
    positions = torch.tensor([0, 1, 7])
    out = apply_rope(x, *rope_tables(positions, 4, 100.0))[:, 0]
    angle = positions.float()
    expected = torch.stack([angle.cos(), -2 * (angle / 10).sin(), angle.sin(), 2 * (angle / 10).cos()], dim=1)
    torch.testing.assert_close(out, expected)


def test_rope_keeps_far_positions_apart_in_bf16():
    x = torch.ones(2, 1, 32, dtype=torch.bfloat16)
    near, far = apply_rope(x, *rope_tables(torch.tensor([1_000_000, 1_000_001]), 32, 1e6))
    assert near.dtype == torch.bfloat16 and (near - far).abs().max() > 0.5
