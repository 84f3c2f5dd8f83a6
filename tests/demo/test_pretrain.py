"""What the decoder starts from and is tested by: the heads that are laid out, the positions that jump, and what counts as recalled."""

import numpy as np
import pytest
import torch

from longvita.data.processor import collate
from longvita.data.schema import Sample
from longvita.demo import induction, pretrain
from longvita.demo.material import make_config, make_tokenizer
from longvita.eval import haystack
from longvita.model.batch import IGNORE
from longvita.model.long_vita import LongVita


@pytest.fixture(scope="module")
def processor():
    from longvita.data.processor import Processor

    tokenizer = make_tokenizer()
    return Processor(make_config(tokenizer), tokenizer)


@pytest.fixture(scope="module")
def model(processor):
    model = LongVita(processor.config)
    induction.recall_init(model, processor, 0)
    return model.eval()


def attention_of(model, layer, head, x_TE, positions_T):
    """(T, T) probabilities of one head, written out: causal softmax of rotated q · k."""
    text = model.config.text
    attention = model.model.layers[layer].self_attn
    q, k = (p(x_TE).unflatten(1, (-1, text.head_dim)) for p in (attention.q_proj, attention.k_proj))
    half = text.head_dim // 2
    angles = positions_T[:, None] * text.rope_theta ** (-torch.arange(half) / half)

    def turned(x_TD):
        a, b = x_TD[:, :half], x_TD[:, half:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=1)

    scores = turned(q[:, head]) @ turned(k[:, head * text.num_kv_heads // text.num_heads]).T / text.head_dim**0.5
    mask = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(mask, -torch.inf).softmax(1)


@torch.no_grad()
def test_the_first_layer_s_heads_look_back_as_far_as_they_should(model, processor):
    """One token, and from the place of the answer to the name in the question; at the start of a text and far into it."""
    asked = induction.asked_distance(processor)
    assert asked > 8  # past the template
    ids = torch.randint(len(processor.tokenizer), (80,), generator=torch.Generator().manual_seed(1))
    x_TE = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    for first in (0, 7000):
        for head, distance in ((0, 1), (1, 1), (2, asked), (3, asked)):
            weights = attention_of(model, 0, head, x_TE, torch.arange(80.0) + first)
            rows = torch.arange(distance, 80)
            assert weights[rows, rows - distance].min() > 0.5, (head, distance, first)


def test_the_distance_leads_from_the_answer_to_the_name(processor):
    (name,) = processor.tokenizer.encode(" Malmo")
    turns = [
        {"role": "user", "content": "Some words.\n" + haystack.TEXT_QUESTION.format(name="Malmo")},
        {"role": "assistant", "content": haystack.TEXT_ANSWER.format(name="Malmo", digit=4)},
    ]
    ids = np.asarray(processor.encode(Sample(turns, placeholders=False)).input_ids)
    in_question, in_answer = np.flatnonzero(ids == name)
    assert in_answer - 1 - induction.asked_distance(processor) == in_question


@torch.no_grad()
def test_the_matching_head_matches_from_afar(model, processor):
    """A repeated token finds the one behind its first copy, 48 as well as 1,000 positions back, before all others."""
    ids = torch.randperm(len(processor.tokenizer), generator=torch.Generator().manual_seed(1))[:60]
    ids[-1] = ids[10]  # what the last token looks for lies at 11
    layer = model.model.layers[0]
    x_TE = model.model.embed_tokens(ids)
    for distance in (48, 300, 1000):
        positions = torch.arange(60.0)
        positions[20:] += distance - 48
        mixed = torch.stack([attention_of(model, 0, head, layer.input_layernorm(x_TE), positions) for head in range(4)])
        value_TE = layer.self_attn.v_proj(layer.input_layernorm(x_TE)).unflatten(1, (-1, model.config.text.head_dim))
        groups = model.config.text.num_heads // model.config.text.num_kv_heads
        heads = torch.stack([mixed[head] @ value_TE[:, head // groups] for head in range(4)], dim=1)
        y_TE = x_TE + layer.self_attn.o_proj(heads.flatten(1))
        weights = attention_of(model, 1, 0, model.model.layers[1].input_layernorm(y_TE), positions)[-1]
        others = torch.cat([weights[:11], weights[12:]])
        assert weights[11] > 2 * others.max(), distance


def test_draws_differ_and_repeat(processor):
    first, again, other = (LongVita(processor.config) for _ in range(3))
    for model, seed in ((first, 5), (again, 5), (other, 6)):
        induction.recall_init(model, processor, seed)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)


# ---- positions ----


@pytest.mark.parametrize("reset", [True, False])
def test_positions_jump_before_the_questions_and_stay_below_the_longest_context(processor, reset):
    rng = np.random.default_rng(0)
    hay = haystack.TextHay(haystack.load_prose()[0], processor.tokenizer)
    samples = [haystack.text_needle(hay, processor, 256, rng, facts=3, ask=3).sample for _ in range(4)]
    samples += [haystack.spelled_images(1, rng), haystack.spelled_video(40, rng)]
    batch = collate([processor.encode(sample) for sample in samples], reset=reset)
    furthest, jumped = 0, 0
    for _ in range(40):
        spread = pretrain.spread_positions(batch, 4096, rng)
        assert torch.equal(spread.input_ids, batch.input_ids) and torch.equal(spread.labels, batch.labels)
        for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
            steps = spread.position_ids[start:end].diff()
            assert steps.min() >= 1 and spread.position_ids[end - 1] < 4096
            jumped += int((steps > 1).any())
        furthest = max(furthest, int(spread.position_ids.max()))
        for start, end in zip(batch.sample_cu_seqlens[:-1].tolist(), batch.sample_cu_seqlens[1:].tolist(), strict=True):
            first = start + int(torch.nonzero(batch.labels[start:end] != IGNORE)[0])
            begin = max(start + 1, first - pretrain.QUESTION_TOKENS)
            assert (spread.position_ids[begin:end].diff() == 1).all()  # a question and its answers are never split
    assert furthest > 3800 and jumped > 20
    assert torch.equal(pretrain.spread_positions(batch, 1, rng).position_ids, batch.position_ids)  # no room, no jump


# ---- the test that decides ----


def test_only_whole_answers_are_recalled(processor, monkeypatch):
    """A model that is right everywhere recalls all; one wrong token, name or digit, costs its answer and no other."""
    tests = pretrain.held_out_tests(processor, np.random.default_rng(0))
    batch = tests["text"][0]
    targets = batch.shifted_labels()
    rows = torch.nonzero(targets != IGNORE)[:, 0]
    names = {processor.tokenizer.encode(" " + name)[0] for name in haystack.NAMES}
    codes = [i for i, row in enumerate(rows.tolist()) if int(targets[row]) in names]
    texts, asked = pretrain.TESTED[256]
    assert len(codes) == texts * asked

    class Parrot:
        def __init__(self, wrong):
            self.wrong = wrong

        def logits(self, batch, rows_M):
            choice = batch.shifted_labels()[rows_M].clone()
            choice[self.wrong] = (choice[self.wrong] + 1) % 100
            return torch.nn.functional.one_hot(choice, len(processor.tokenizer)).float()

    def recalled(wrong):
        return pretrain.recall(Parrot(wrong), {"text": [batch]})["text"]

    assert recalled([]) == 1.0
    assert recalled([codes[0]]) == recalled([codes[0] + 1]) == recalled([codes[0], codes[0] + 1]) == 1 - 1 / len(codes)
    assert recalled([codes[0], codes[1] + 1]) == 1 - 2 / len(codes)


def test_what_the_decoder_is_tested_on_is_held_out_and_repeats(processor):
    first, again = (pretrain.held_out_tests(processor, np.random.default_rng(3)) for _ in range(2))
    assert all(torch.equal(a.input_ids, b.input_ids) for kind in first for a, b in zip(first[kind], again[kind], strict=True))
    train = haystack.load_prose()[0]
    text = processor.tokenizer.decode(first["text"][1].input_ids[:400].tolist())
    passage = max(text.split("Remember the code"), key=len)[12:].strip()[:60]
    assert passage and passage not in train
