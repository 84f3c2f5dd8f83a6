"""The tokenizer, streaming, and token layouts written out by hand."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from longvita.config import TokenIds
from longvita.data.template import SPECIAL_TOKENS, ChatTokenizer, Layout
from tests.data.support import TEXTS

PUBLISHED = {
    "<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<img>": 151665, "</img>": 151666, "<IMG_CONTEXT>": 151667,
    "<vid>": 151668, "</vid>": 151669, "<VID_CONTEXT>": 151670, "<patch>": 151671, "</patch>": 151672, "<PATCH_CONTEXT>": 151673,
    "<quad>": 151674, "</quad>": 151675, "<ref>": 151676, "</ref>": 151677, "<box>": 151678, "</box>": 151679, "<image>": 151680,
    "<video>": 151681,
}  # fmt: skip


def byte_level(base: int) -> Tokenizer:
    """A byte-level tokenizer with `base` words: the 256 bytes in the order of Qwen2.5's vocabulary, then words nobody writes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {word: i for i, word in enumerate([*alphabet, *(f"filler{i}" for i in range(base - 256))])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_special_tokens_come_last_in_the_published_order(tokenizer):
    assert [tokenizer.special[token] for token in SPECIAL_TOKENS] == list(range(300, 320)) and len(tokenizer) == 320


def test_published_ids_on_a_tokenizer_shaped_like_qwens():
    base = byte_level(151643)
    base.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS[:3]])
    base.add_tokens([AddedToken(f"<|qwen{i}|>", special=False) for i in range(151665 - 151646)])
    tokenizer = ChatTokenizer(base, add_missing=True)
    assert tokenizer.special == PUBLISHED
    newline = tokenizer.encode("\n")
    assert tokenizer.token_ids == TokenIds(newline=newline[0]) and len(tokenizer) == 151682
    assert tokenizer.encode("<|im_end|><|qwen3|>")[-1] == 151649, "the base's own added words stay whole"
    assert not set(PUBLISHED.values()) & set(tokenizer.encode("".join(SPECIAL_TOKENS)))


def test_training_is_deterministic_and_small_vocabularies_work():
    first, second = (ChatTokenizer.train_bpe(iter(TEXTS), 300) for _ in range(2))
    assert first.tokenizer.to_str() == second.tokenizer.to_str() and len(first) == 300
    bytes_only = ChatTokenizer.train_bpe(TEXTS, 276)
    assert len(bytes_only) == 276 and len(bytes_only.encode("Zürich")) == 7
    assert len(ChatTokenizer.train_bpe(["ab"], 400)) == 277, "nothing else is worth merging"
    with pytest.raises(ValueError, match=r"vocab_size must be at least 276 \(256 bytes and 20 special tokens\), got 275"):
        ChatTokenizer.train_bpe(TEXTS, 275)


def test_merges_are_learned(tokenizer):
    assert len(tokenizer.encode("the lazy dog. ")) < 14


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",))))
def test_every_text_survives(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    stream = tokenizer.stream()
    assert "".join(stream.push(i) for i in ids) + stream.flush() == text


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_spelled_special_tokens_are_text(tokenizer, token):
    for text in (token, f"a{token}b", f" {token}\n{token}"):
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.special.values())
        assert tokenizer.decode(ids) == text


def test_streaming_waits_for_whole_characters(tokenizer):
    ids = tokenizer.encode("é€😀")
    stream = tokenizer.stream()
    pieces = [stream.push(np.int64(i)) for i in ids]
    assert "".join(pieces) == "é€😀" and "\ufffd" not in "".join(pieces) and "" in pieces
    cut = tokenizer.stream()
    assert cut.push(ids[:-1]) == "é€" and cut.flush() == "\ufffd" and cut.push(tokenizer.encode("a")) == "a"


def test_decoding_skips_special_and_unknown_ids(tokenizer):
    ids = [tokenizer.special["<|im_start|>"], *tokenizer.encode("hi"), tokenizer.special["<|im_end|>"], 10_000]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special=False) == "<|im_start|>hi<|im_end|>"


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    tokenizer.save(tmp_path / "other.json")
    for path in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path / "other.json")):
        loaded = ChatTokenizer.from_file(path)
        assert loaded.token_ids == tokenizer.token_ids and loaded.encode("the lazy <img>") == tokenizer.encode("the lazy <img>")


def test_other_tokenizers_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match="expected a byte-level BPE tokenizer .* got one with the decoder NoneType; load the tokenizer.json"
    ):
        ChatTokenizer(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match=r"lacks the special tokens <\|endoftext\|>, .*add_missing=True"):
        ChatTokenizer(byte_level(256))
    with pytest.raises(ValueError, match="expected a tokenizer.json at .*nowhere"):
        ChatTokenizer.from_file(tmp_path / "nowhere")
    for content in ("{}", "no json", "[]", json.dumps({"model": {"type": "Strange"}, "decoder": {"type": "ByteLevel"}})):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match="expected a byte-level BPE tokenizer in Hugging Face's JSON format"):
            ChatTokenizer.from_file(tmp_path)


# ---- layout ----


def spelled(tokenizer, ids):
    return tokenizer.decode(ids, skip_special=False)


@pytest.mark.parametrize("tokens_per_tile", [1, 3, 16, 256])
def test_layouts_by_hand(tokenizer, tokens_per_tile):
    layout, p = Layout(tokenizer, tokens_per_tile), tokens_per_tile
    image = "<img>" + "<IMG_CONTEXT>" * p + "</img>"
    patch = "<patch>" + "<PATCH_CONTEXT>" * p + "</patch>"
    frame = "<vid>" + "<VID_CONTEXT>" * p + "</vid>"
    assert spelled(tokenizer, layout.image(1, 1)) == image
    assert spelled(tokenizer, layout.image(3, 2)) == image + "\n" + patch * 3 + "\n" + patch * 3
    assert spelled(tokenizer, layout.image(1, 2)) == image + "\n" + patch + "\n" + patch
    assert spelled(tokenizer, layout.video(2)) == frame * 2
    assert layout.tokens_per_frame == p + 2 == len(layout.video(1))
    assert spelled(tokenizer, layout.turn_start("user")) == "<|im_start|>user\n"
    assert spelled(tokenizer, layout.turn_end) == "<|im_end|>\n"


def test_layout_of_an_image_in_ids(tokenizer):
    ids, newline = tokenizer.token_ids, tokenizer.token_ids.newline
    patch = [ids.patch, ids.patch_context, ids.patch_context, ids.patch_end]
    want = [ids.img, ids.img_context, ids.img_context, ids.img_end, newline, *patch, *patch]
    assert Layout(tokenizer, 2).image(2, 1).tolist() == want


def test_tile_rows_are_the_context_tokens_in_order(tokenizer):
    layout = Layout(tokenizer, 2)
    ids = np.concatenate([layout.text("ab"), layout.video(1), layout.text("c"), layout.image(1, 1)])
    start = len(layout.text("ab"))
    after = start + 4 + len(layout.text("c"))
    assert layout.tile_rows(ids).tolist() == [[start + 1, start + 2], [after + 1, after + 2]]
    assert layout.tile_rows(layout.text("no tiles")).shape == (0, 2)
