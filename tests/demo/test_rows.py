"""Every kind of row is what it says, fits its length, and passes the strict reader."""

import json

import numpy as np
import pytest

from longvita.data.schema import JsonlSource
from longvita.demo import material
from longvita.demo.plan import make_plan
from longvita.demo.rows import RowMaker
from longvita.eval import haystack


@pytest.fixture(scope="module")
def maker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    material.write_images(folder)
    tokenizer = material.make_tokenizer()
    processor = material.make_processor(material.make_config(tokenizer), tokenizer, folder)
    return RowMaker(folder, make_plan("default").stages[1], processor, np.random.default_rng(0))


def encode(maker, row):
    path = maker.material / "one.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return maker.processor.encode(JsonlSource(str(path))[0])


@pytest.mark.parametrize("kind", ["images", "captions", "videos", "texts", "mixed"])
@pytest.mark.parametrize("longest", [512, 2048])
def test_rows_fit_and_their_tokens_are_as_counted(maker, kind, longest):
    for _ in range(8):
        row, tokens = maker.makers[kind](longest)
        encoded = encode(maker, row)
        assert encoded.num_tokens <= longest
        assert encoded.num_tokens <= tokens + 8 * len(row["messages"])  # an estimate, good enough to fill a stage
        assert (encoded.labels != -100).sum() >= 3 * len(row["messages"]) / 2
        assert (
            len(encoded.loaded().tiles)
            == (encoded.input_ids == maker.processor.config.tokens.img_context).sum() / 16
            + (encoded.input_ids == maker.processor.config.tokens.vid_context).sum() / 16
        )


def test_a_caption_says_what_is_in_every_frame(maker):
    row, _ = maker.caption(512)
    words = row["messages"][1]["content"].split()
    frames = encode(maker, row).loaded().tiles
    assert len([word for word in words if word in haystack.WORDS]) == len(frames)
    reddish = [frame[0].mean(0)[0] - frame[0].mean(0)[1] > 60 for frame in frames]
    marked, previous = [], ""
    for word in words:
        if word in haystack.WORDS:
            marked.append(previous == haystack.MARK_WORD)
        previous = word
    assert marked == reddish


def test_images_come_once_before_any_comes_again(maker):
    maker._deck = []
    seen = []
    while len(seen) < len(maker.digits) - 4:
        row, _ = maker.image(512)
        seen += row["images"]
    assert len(set(seen)) == len(seen)


def test_joined_stages_leave_no_room_for_two_needles(maker):
    joined = RowMaker(maker.material, make_plan("default").stages[3], maker.processor, np.random.default_rng(1))
    assert all(joined._tokens("videos", 8192) >= 4096 for _ in range(200))
    assert min(maker._tokens("videos", 8192) for _ in range(200)) < 1024


def test_the_same_seed_writes_the_same_rows(tmp_path):
    tokenizer = material.make_tokenizer()
    stage = make_plan("quick").stages[0]
    texts = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        processor = material.make_processor(material.make_config(tokenizer), tokenizer, folder)
        texts.append(material.write_stage(folder, stage, processor, seed=3).read_bytes())
        videos = sorted((folder / "videos").rglob("*.mp4"))
        texts[-1] += b"".join(path.read_bytes() for path in videos)
    assert texts[0] == texts[1]
