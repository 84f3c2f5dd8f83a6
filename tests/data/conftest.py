"""A tokenizer, a tiny model's processor, a writer of JSONL files."""

import dataclasses
import json

import pytest

from longvita.config import presets
from longvita.data.media import MediaLimits
from longvita.data.processor import Processor
from longvita.data.template import ChatTokenizer
from tests.data.support import TEXTS


@pytest.fixture(scope="session")
def tokenizer():
    return ChatTokenizer.train_bpe(TEXTS, 320)


@pytest.fixture(scope="session")
def config(tokenizer):
    """The tiny preset (32-pixel tiles, 16 tokens each) with the ids of the test tokenizer."""
    return dataclasses.replace(presets["tiny"], tokens=tokenizer.token_ids)


@pytest.fixture(scope="session")
def processor(config, tokenizer):
    return Processor(config, tokenizer)


@pytest.fixture
def rooted(config, tokenizer, tmp_path):
    """A processor that reads below tmp_path only."""
    return Processor(config, tokenizer, MediaLimits(root=str(tmp_path)))


@pytest.fixture
def write_jsonl(tmp_path):
    """write_jsonl(rows, name) → path; a row is an object, or bytes taken as they are."""

    def write(rows, name="rows.jsonl"):
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path = tmp_path / name
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write
