"""Generation: the cache and the chunks change nothing, prompts run together as they would alone, answers stop where they must."""

import dataclasses

import pytest
import torch

from longvita import Batch, LongVita, generate, generate_ids, presets
from longvita.data.processor import Processor
from longvita.data.template import ChatTokenizer
from longvita.infer import engine
from longvita.infer.sampling import SamplingParams
from longvita.model.cache import KVCache

TINY = presets["tiny"]


@pytest.fixture(scope="module")
def tokenizer():
    return ChatTokenizer.train_bpe(["some plain English words to learn a few merges from, again and again"], 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    # Large weights: without training, answers should at least differ between prompts and steps.
    config = dataclasses.replace(TINY, tokens=tokenizer.token_ids)
    return LongVita(config).init_weights(2, 0.25)


@pytest.fixture(scope="module")
def processor(model, tokenizer):
    return Processor(model.config, tokenizer)


def prompts(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]


def image_prompts():
    """A prompt with two tiles, one without, one with a tile."""
    batch = Batch.from_ids(prompts(60, 9, 40))
    rows = torch.stack([torch.arange(5, 21), torch.arange(30, 46), torch.arange(80, 96)])
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(6))
    return dataclasses.replace(batch, images=images, image_indices=torch.stack([torch.zeros_like(rows), rows]))


@torch.no_grad()
def without_cache(model, ids, steps):
    """Greedy tokens by running the whole sequence again for each one."""
    ids, answer = list(ids), []
    for _ in range(steps):
        token = model.logits(Batch.from_ids([ids])).argmax().item()
        if token in model.config.tokens.eos:
            break
        ids.append(token)
        answer.append(token)
    return answer


@pytest.mark.parametrize("chunk", [1, 7, 64, 8192])
def test_cache_and_chunks_give_the_tokens_of_whole_passes(model, chunk):
    texts = prompts(70, 3, 1, 25)
    expected = [without_cache(model, ids, 12) for ids in texts]
    assert generate_ids(model, texts, max_new_tokens=12, prefill_chunk=chunk) == expected
    assert len({tuple(answer) for answer in expected}) == 4 and max(len(set(answer)) for answer in expected) > 6


def test_chunks_with_images_give_the_same_tokens(model):
    batch = image_prompts()
    expected = generate_ids(model, batch, max_new_tokens=10)
    for chunk in (1, 7, 64):
        assert generate_ids(model, batch, max_new_tokens=10, prefill_chunk=chunk) == expected
    blank = dataclasses.replace(batch, images=torch.zeros_like(batch.images))
    other = generate_ids(model, blank, max_new_tokens=10)
    assert other[0] != expected[0] and other[1] == expected[1] and other[2] != expected[2]


def test_groups_change_nothing(model, monkeypatch):
    texts = prompts(30, 5, 17, 44, 2, 9, 30)
    expected = [generate_ids(model, [ids], max_new_tokens=8)[0] for ids in texts]
    sizes = []
    monkeypatch.setattr(engine, "KVCache", lambda config, n, **options: sizes.append(n) or KVCache(config, n, **options))
    assert generate_ids(model, texts, max_new_tokens=8) == expected and sizes == [7]
    sizes.clear()
    assert generate_ids(model, iter(texts), max_new_tokens=8, tokens_at_once=110) == expected
    assert sizes == [2, 2, 2, 1]  # 2 × 38, 2 × 52, 2 × 17 and no third beside 38, 38
    batches = [Batch.from_ids(texts[:3]), texts[3], Batch.from_ids(texts[4:])]
    assert generate_ids(model, batches, max_new_tokens=8, tokens_at_once=1) == expected
    assert generate_ids(model, Batch.from_ids(texts), max_new_tokens=8) == expected
    assert generate_ids(model, [], max_new_tokens=8) == []


def test_sampling_follows_the_seed_whatever_the_grouping(model):
    texts = prompts(30, 5, 17)
    params = SamplingParams(temperature=1.5, top_p=0.95, top_k=50, seed=3)
    first = generate_ids(model, texts, max_new_tokens=10, params=params)
    assert generate_ids(model, texts, max_new_tokens=10, params=params, tokens_at_once=1, prefill_chunk=7) == first
    assert generate_ids(model, texts, max_new_tokens=10, params=dataclasses.replace(params, seed=4)) != first
    assert first != generate_ids(model, texts, max_new_tokens=10)


def test_repetition_penalty_reaches_the_model(model):
    [ids] = prompts(20)
    params = SamplingParams(repetition_penalty=1e6)
    [answer] = generate_ids(model, [ids], max_new_tokens=40, params=params, stop_tokens=())
    assert len(answer) == 40 == len(set(answer)) and not set(answer) & set(ids)


def test_a_stop_token_ends_its_own_answer_only(model):
    texts = prompts(30, 5, 17)
    free = generate_ids(model, texts, max_new_tokens=20, stop_tokens=())
    assert [len(answer) for answer in free] == [20, 20, 20]
    stop = free[0][6]
    stopped = generate_ids(model, texts, max_new_tokens=20, stop_tokens=[stop])
    assert stopped == [answer[: answer.index(stop)] if stop in answer else answer for answer in free]
    assert len(stopped[0]) <= 6 and max(len(answer) for answer in stopped) == 20
    at_once = generate_ids(model, texts[:1], max_new_tokens=20, stop_tokens=[free[0][0]])
    assert at_once == [[]]


def test_only_rows_that_are_read_go_through_the_head(model, monkeypatch):
    rows = []
    head = engine.masked_lm_head
    monkeypatch.setattr(engine, "masked_lm_head", lambda hidden, weight, index: rows.append(len(index)) or head(hidden, weight, index))
    generate_ids(model, prompts(30, 5, 17), max_new_tokens=3, stop_tokens=(), prefill_chunk=16)
    assert rows == [1, 1, 1, 3, 3]  # chunks end at 16, 32, 48 and 52, prompts at 30, 35 and 52; then two steps of three


def test_gradients_are_not_kept(model):
    assert all(parameter.requires_grad for parameter in model.parameters())
    seen = []
    hook = model.model.norm.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    generate_ids(model, prompts(4), max_new_tokens=3, stop_tokens=())
    hook.remove()
    assert seen == [False] * 3


def test_errors_teach(model):
    with pytest.raises(ValueError, match="conversation 1 has no tokens"):
        generate_ids(model, [[1], []], max_new_tokens=2)
    with pytest.raises(ValueError, match="max_new_tokens and prefill_chunk must be at least 1, got 0 and 8192"):
        generate_ids(model, [[1]], max_new_tokens=0)
    with pytest.raises(ValueError, match="3 prompt tokens . max_new_tokens 16382 exceed the model's 16384 positions"):
        generate_ids(model, [[1, 2, 3]], max_new_tokens=16382)
    with pytest.raises(ValueError, match="input_ids must lie in"):
        generate_ids(model, [[1, 999]], max_new_tokens=2)


# ---- text ----


def ask(text):
    return [{"role": "user", "content": text}]


def test_streamed_text_is_the_decoded_answer(model, processor):
    batch = processor(ask("What is this?"))
    [ids] = generate_ids(model, batch, max_new_tokens=30)
    expected = processor.tokenizer.decode(ids)
    pieces = list(generate(model, processor, ask("What is this?"), max_new_tokens=30))
    assert "".join(pieces) == expected and len(pieces) > 5 and all(pieces)
    assert list(generate(model, processor, batch, max_new_tokens=30)) == pieces


def test_text_stops_before_a_stop_string(model, processor):
    whole = "".join(generate(model, processor, ask("Count!"), max_new_tokens=40))
    assert len(whole) > 12
    stop = whole[8:11]
    pieces = list(generate(model, processor, ask("Count!"), max_new_tokens=40, stop=stop))
    assert "".join(pieces) == whole[: whole.index(stop)]


def test_sampled_text_follows_the_seed(model, processor):
    def answer(seed):
        return "".join(generate(model, processor, ask("Hello"), max_new_tokens=20, temperature=1.5, seed=seed))

    assert answer(1) == answer(1) != answer(2)


def test_images_are_answered(model, processor):
    def answer(image):
        content = [{"type": "image", "image": image}, {"type": "text", "text": "Which digit?"}]
        return "".join(generate(model, processor, [{"role": "user", "content": content}], max_new_tokens=20))

    black, noise = torch.zeros(40, 40, 3), torch.rand(40, 40, 3) * 255
    assert answer(black.byte().numpy()) != answer(noise.byte().numpy())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature must be"),
        ({"top_p": 2}, "top_p must be"),
        ({"stop": [""]}, "stop must hold non-empty strings"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"prefill_chunk": 0}, "prefill_chunk must be at least 1"),
    ],
)
def test_generate_refuses_before_it_starts(model, processor, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, processor, ask("Hello"), **options)  # not iterated: the call itself raises


def test_generate_streams_one_conversation(model, processor):
    with pytest.raises(ValueError, match="generate streams one conversation, got 2: .*generate_ids"):
        generate(model, processor, [ask("a"), ask("b")])
