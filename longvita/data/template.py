"""Text ↔ tokens, and the layout of a conversation: ChatML with tiles and frames in their places.

    tokenizer = ChatTokenizer.train_bpe(texts, vocab_size=512)          # or ChatTokenizer.from_file("tokenizer.json")
    ids = tokenizer.encode("Hello")                                      # literal: "<|im_end|>" in a text never becomes the special token

Shapes: T tokens, P tokens per tile.
"""

import codecs
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from longvita.config import TokenIds

# In the order of their ids, after the base vocabulary. The first three are Qwen2.5's own, the others Long-VITA's.
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<img>", "</img>", "<IMG_CONTEXT>", "<vid>", "</vid>", "<VID_CONTEXT>", "<patch>", "</patch>", "<PATCH_CONTEXT>",
    "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>", "<image>", "<video>",
)  # fmt: skip
_FIELDS = {
    "bos": "<|endoftext|>", "pad": "<|endoftext|>", "im_start": "<|im_start|>", "im_end": "<|im_end|>",
    "img": "<img>", "img_end": "</img>", "img_context": "<IMG_CONTEXT>",
    "vid": "<vid>", "vid_end": "</vid>", "vid_context": "<VID_CONTEXT>",
    "patch": "<patch>", "patch_end": "</patch>", "patch_context": "<PATCH_CONTEXT>", "image": "<image>", "video": "<video>",
}  # fmt: skip
# How Qwen2.5 cuts text before merging: words with their blank, single digits, punctuation, line ends.
_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table of printable stand-ins: every byte that does not print is moved, in order, to 256 and up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(moved)}


class ChatTokenizer:
    """A byte-level BPE with Long-VITA's special tokens. ValueError if the tokenizer is of another kind or lacks one of them."""

    def __init__(self, tokenizer: Tokenizer, *, add_missing: bool = False):
        if not isinstance(tokenizer.decoder, decoders.ByteLevel):
            raise ValueError(
                f"expected a byte-level BPE tokenizer (as Qwen2.5's), got one with the decoder {type(tokenizer.decoder).__name__}; "
                "load the tokenizer.json that came with the model, or train one with ChatTokenizer.train_bpe"
            )
        missing = [token for token in SPECIAL_TOKENS if tokenizer.token_to_id(token) is None]
        if missing and not add_missing:
            raise ValueError(
                f"the tokenizer lacks the special tokens {', '.join(missing)}; load the one that belongs to Long-VITA, "
                "or pass add_missing=True to append them in the published order"
            )
        if missing:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in missing])
        self.tokenizer = tokenizer
        self._literal = _without_special_tokens(tokenizer)
        self.special = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}

    # ---- making and keeping ----

    @classmethod
    def from_file(cls, path: str | os.PathLike, *, add_missing: bool = False) -> "ChatTokenizer":
        """Reads a `tokenizer.json`, or the one in a directory."""
        path = os.fspath(path)
        if os.path.isdir(path):
            path = os.path.join(path, "tokenizer.json")
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"expected a tokenizer.json at {path}, got {error}; name the file or the directory it lies in") from None
        try:
            kinds = [json.loads(text)[part]["type"] for part in ("model", "decoder")]
            if kinds != ["BPE", "ByteLevel"]:
                raise ValueError(f"a model of kind {kinds[0]} with a decoder of kind {kinds[1]}")
            tokenizer = Tokenizer.from_str(text)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: expected a byte-level BPE tokenizer in Hugging Face's JSON format, got something else ({error}); copy it again"
            ) from None
        return cls(tokenizer, add_missing=add_missing)

    def save(self, path: str | os.PathLike) -> None:
        """Writes `tokenizer.json` to a file, or into a directory; a crash leaves the old file or the new one."""
        from longvita.model.checkpoint_io import atomic_write_bytes  # brings torch: only where it is needed

        path = os.fspath(path)
        file = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
        atomic_write_bytes(file, self.tokenizer.to_str(pretty=True).encode())

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int) -> "ChatTokenizer":
        """A byte-level BPE learned from `texts`, special tokens last; `vocab_size` counts everything and is at least 276. Deterministic.

        If the texts hold too few pairs worth merging, the vocabulary stays smaller: see len().
        """
        base = vocab_size - len(SPECIAL_TOKENS)
        if base < 256:
            least = f"{256 + len(SPECIAL_TOKENS)} (256 bytes and {len(SPECIAL_TOKENS)} special tokens)"
            raise ValueError(f"vocab_size must be at least {least}, got {vocab_size}")
        tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(_PATTERN), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=base, initial_alphabet=alphabet, show_progress=False))
        return cls(tokenizer, add_missing=True)

    # ---- text ↔ ids ----

    def __len__(self) -> int:
        """One more than the largest id."""
        return self._size

    @cached_property
    def _size(self) -> int:
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """The ids of a text, taken literally: no special token comes out, whatever the text spells."""
        return self._literal.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD, ids outside the vocabulary nothing."""
        stream = self.stream(skip_special=skip_special)
        return stream.push(ids) + stream.flush()

    def stream(self, *, skip_special: bool = True) -> "StreamDecoder":
        """A decoder that takes ids as they come and gives out whole characters only."""
        return StreamDecoder(self._bytes, frozenset() if not skip_special else self._special_ids)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self.tokenizer.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special) | frozenset(self.special.values())

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        table = _byte_of_character()
        words = self.tokenizer.get_vocab(with_added_tokens=False)
        added = {i: token.content.encode() for i, token in self.tokenizer.get_added_tokens_decoder().items()}
        return {i: bytes(table[char] for char in word) for word, i in words.items() if i not in added} | added

    @cached_property
    def token_ids(self) -> TokenIds:
        """The special tokens by the names the model's config uses."""
        newline = self.encode("\n")
        eos = (self.special["<|im_end|>"], self.special["<|endoftext|>"])
        ids = {name: self.special[token] for name, token in _FIELDS.items()}
        return TokenIds(eos=eos, newline=newline[0] if len(newline) == 1 else None, **ids)


def _without_special_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that encodes the spelling of special tokens as ordinary text."""
    data = json.loads(tokenizer.to_str())
    for token in data["added_tokens"]:
        token["special"] = token["special"] or token["content"] in SPECIAL_TOKENS
    data["post_processor"] = data["truncation"] = data["padding"] = None
    literal = Tokenizer.from_str(json.dumps(data))
    literal.encode_special_tokens = True
    return literal


class StreamDecoder:
    """Bytes of tokens to text, piece by piece: a character cut between two tokens waits for its other half."""

    def __init__(self, table: dict[int, bytes], skipped: frozenset[int]):
        self._table, self._skipped = table, skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int] | int) -> str:
        """The characters that are whole after these ids."""
        ids = (ids,) if isinstance(ids, int | np.integer) else ids
        return self._decoder.decode(b"".join(self._table.get(int(i), b"") for i in ids if int(i) not in self._skipped))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


# ---- layout ----


class Layout:
    """Token sequences of the chat template as int32 arrays, for tiles of `tokens_per_tile` tokens."""

    def __init__(self, tokenizer: ChatTokenizer, tokens_per_tile: int):
        ids = tokenizer.token_ids
        self.tokenizer, self.tokens_per_tile = tokenizer, tokens_per_tile
        self.newline = _array(tokenizer.encode("\n"))
        self.turn_end = np.concatenate([_array([ids.im_end]), self.newline])
        self._turn_start = {
            role: np.concatenate([_array([ids.im_start, *tokenizer.encode(role)]), self.newline])
            for role in ("system", "user", "assistant")
        }
        self.context_ids = (ids.img_context, ids.vid_context, ids.patch_context)
        self._image = _wrapped(ids.img, ids.img_context, ids.img_end, tokens_per_tile)
        self._frame = _wrapped(ids.vid, ids.vid_context, ids.vid_end, tokens_per_tile)
        self._patch = _wrapped(ids.patch, ids.patch_context, ids.patch_end, tokens_per_tile)

    @property
    def tokens_per_frame(self) -> int:
        return self.tokens_per_tile + 2

    def text(self, text: str) -> np.ndarray:
        return _array(self.tokenizer.encode(text))

    def turn_start(self, role: str) -> np.ndarray:
        """`<|im_start|>role\\n`"""
        return self._turn_start[role]

    def image(self, columns: int, rows: int) -> np.ndarray:
        """The thumbnail, or the only tile; with more tiles, a line of `<patch>`es for every row of the grid."""
        if columns * rows == 1:
            return self._image
        line = np.concatenate([self.newline, np.tile(self._patch, columns)])
        return np.concatenate([self._image, np.tile(line, rows)])

    def video(self, frames: int) -> np.ndarray:
        return np.tile(self._frame, frames)

    def tile_rows(self, ids_T: np.ndarray) -> np.ndarray:
        """(tiles, P) int32: where the tiles' features go. Texts cannot spell a context token, so all of them belong to tiles, in order."""
        rows = np.flatnonzero(np.isin(ids_T, self.context_ids))
        return rows.astype(np.int32).reshape(-1, self.tokens_per_tile)


def _array(ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, dtype=np.int32)


def _wrapped(start: int, context: int, end: int, count: int) -> np.ndarray:
    return _array([start, *[context] * count, end])
