"""Rows: what is accepted, and that everything else is refused with file, line, expectation and remedy."""

import json
from collections import Counter

import pytest

from longvita.data.schema import DataError, JsonlSource, Part, Sample, as_sample, read_jsonl

ASK = {"role": "user", "content": "Hello"}
ANSWER = {"role": "assistant", "content": "Hi"}


def user(content):
    return {"role": "user", "content": content}


def texts(sample, **options):
    return [(turn.role, [(part.kind, part.value) for part in turn.parts]) for turn in sample.turns(**options)]


def test_messages_with_placeholders_take_media_in_order(write_jsonl, tmp_path):
    row = {"messages": [user("<image>a<video>b<image>"), ANSWER], "images": ["x.jpg", "/y.jpg"], "videos": ["z.mp4"]}
    (sample,) = read_jsonl(write_jsonl([row]))
    parts = [
        ("image", str(tmp_path / "x.jpg")), ("text", "a"), ("video", str(tmp_path / "z.mp4")), ("text", "b"), ("image", "/y.jpg"),
    ]  # fmt: skip
    assert texts(sample) == [("user", parts), ("assistant", [("text", "Hi")])]


def test_conversations_form_is_the_same(write_jsonl):
    row = {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]}
    (sample,) = read_jsonl(write_jsonl([row]))
    assert texts(sample) == [("system", [("text", "S")]), ("user", [("text", "Hello")]), ("assistant", [("text", "Hi")])]


def test_part_lists_hold_literal_text_and_take_media_from_the_row(write_jsonl, tmp_path):
    content = [{"type": "text", "text": "a literal <image>"}, {"type": "image"}, {"type": "video", "video": "own.mp4"}]
    (sample,) = read_jsonl(
        write_jsonl([{"messages": [user(content), ANSWER], "images": ["x.jpg"], "videos": None, "id": 7, "metadata": {}}])
    )
    assert sample.turns()[0].parts == (
        Part("text", "a literal <image>"),
        Part("image", str(tmp_path / "x.jpg")),
        Part("video", str(tmp_path / "own.mp4")),
    )


def test_answers_and_system_messages_are_literal(write_jsonl):
    row = {"messages": [{"role": "system", "content": "<image>"}, ASK, {"role": "assistant", "content": "use the <video> tag"}]}
    (sample,) = read_jsonl(write_jsonl([row]))
    assert sample.turns()[2].parts == (Part("text", "use the <video> tag"),)


def test_messages_from_a_program_are_literal_unless_they_come_as_a_sample():
    assert as_sample([user("see <image>")]).turns(training=False)[0].parts == (Part("text", "see <image>"),)
    with pytest.raises(DataError, match="expected as many <image> placeholders as images, got 1 and 0"):
        Sample([user("see <image>")]).turns(training=False)


def test_urls_are_left_for_the_media_limits_to_refuse(write_jsonl):
    (sample,) = read_jsonl(write_jsonl([{"messages": [user("<image>"), ANSWER], "images": ["https://example.org/x.jpg"]}]))
    assert sample.turns()[0].parts[0].value == "https://example.org/x.jpg"


def test_blank_lines_are_no_rows_and_numbers_are_those_of_the_file(tmp_path):
    good = json.dumps({"messages": [ASK, ANSWER]})
    path = tmp_path / "a.jsonl"
    path.write_text(f"\n{good}\n   \n\n{good}")  # no newline at the end
    source = JsonlSource(path)
    assert len(source) == 2
    assert [source[i].line for i in (0, 1, -1, -2)] == [2, 5, 5, 2]
    assert [texts(source[i]) for i in (0, 1)] == [texts(source[-2]), texts(source[-1])]
    with pytest.raises(IndexError):
        source[2]


def test_media_dir_moves_relative_paths(write_jsonl):
    path = write_jsonl([{"messages": [user("<image>"), ANSWER], "images": ["x.jpg"]}])
    assert JsonlSource(path, media_dir="/data/images")[0].images == ["/data/images/x.jpg"]


def test_checksum_sees_a_changed_file(write_jsonl):
    rows = [{"messages": [ASK, ANSWER]}] * 3
    before = JsonlSource(write_jsonl(rows)).checksum
    assert JsonlSource(write_jsonl(rows)).checksum == before
    assert JsonlSource(write_jsonl(rows[:2])).checksum != before
    assert JsonlSource(write_jsonl([rows[0], {"messages": [user("Hello!"), ANSWER]}, rows[2]])).checksum != before


GOOD = {"messages": [ASK, ANSWER]}
BROKEN = [
    # (row, reason, what the message must say)
    (b'{"messages": [}', "json", r"broken JSON at column 15 .*; fix or remove the line"),
    (b"[1, 2]", "json", r"expected one JSON object per line, got list"),
    (b'{"messages": [], "messages": []}', "json", r"expected every key once .* got 'messages' twice"),
    (b'{"messages": NaN}', "json", r"got NaN"),
    (b"[" * 100_000, "json", r"nested a thousand levels deep"),
    (b'{"id": ' + b"1" * 5000 + b"}", "json", r"a number Python does not read"),
    (b'{"messages": "\xff"}', "utf8", r"expected UTF-8, got byte 0xff at byte 15"),
    (b'\xef\xbb\xbf{"messages": []}', "utf8", r"byte order mark"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}', "utf8", r"half of a surrogate pair"),
    ({**GOOD, "image": ["x"]}, "unknown_key", r"got 'image'; did you mean 'images'"),
    ({"messages": [{**ASK, "name": "x"}, ANSWER]}, "unknown_key", r"keys role, content in message 1, got 'name'"),
    ({"messages": [user([{"type": "text", "text": "x", "bold": 1}]), ANSWER]}, "unknown_key", r"got 'bold'"),
    ({}, "schema", r"exactly one of 'messages' and 'conversations', got only an empty object"),
    ({**GOOD, "conversations": []}, "schema", r"exactly one of 'messages' and 'conversations', got both"),
    ({"messages": []}, "schema", r"at least one message"),
    ({"messages": "hello"}, "schema", r"at least one message, got 'hello'"),
    ({"messages": [ASK, "x"]}, "schema", r"expected message 2 to be an object"),
    ({"messages": [user(None), ANSWER]}, "schema", r"string or a list of parts, got None in message 1"),
    ({"messages": [user([{"type": "audio"}]), ANSWER]}, "schema", r"type text, image or video, got 'audio'"),
    ({"messages": [user(["x"]), ANSWER]}, "schema", r"type text, image or video, got 'x'"),
    ({"messages": [user([{"type": "text"}]), ANSWER]}, "schema", r"a string under 'text', got None"),
    ({**GOOD, "images": "x.jpg"}, "schema", r"a list of paths under 'images', got 'x.jpg'"),
    ({"messages": [user("<image>"), ANSWER], "images": [3]}, "schema", r"a path as text, got 3"),
    ({"messages": [user("<image>"), ANSWER], "images": [""]}, "schema", r"a path as text, got ''"),
    ({"conversations": {}}, "schema", r"a list of turns under 'conversations'"),
    ({"conversations": [{"from": "human"}]}, "schema", r"expected a 'value'"),
    ({"conversations": ["x"]}, "schema", r"an object with 'from' and 'value'"),
    ({"conversations": [{"from": "bot", "value": "x"}]}, "role", r"'from' to be one of human, gpt, .* got 'bot'"),
    ({"conversations": [{"from": "human", "value": "x", "weight": 0}]}, "unknown_key", r"got 'weight'"),
    ({"messages": [{"role": "tool", "content": "x"}, ANSWER]}, "role", r"one of system, user, assistant, got 'tool' in message 1"),
    ({"messages": [ANSWER, ASK]}, "role", r"user and assistant in turns after at most one system message, got assistant, user"),
    ({"messages": [ASK, ASK, ANSWER]}, "role", r"got user, user, assistant"),
    ({"messages": [ASK, ANSWER, {"role": "system", "content": "x"}]}, "role", r"got user, assistant, system"),
    ({"messages": [ASK]}, "role", r"last message to be the assistant's, got the user's; there is no answer"),
    (
        {"messages": [ASK, {"role": "assistant", "content": [{"type": "image", "image": "x.jpg"}]}]},
        "role",
        r"images in the user's turns only",
    ),
    (
        {"messages": [ASK, {"role": "assistant", "content": ""}]},
        "empty_answer",
        r"text in the assistant's message 2, got nothing but blanks",
    ),
    ({"messages": [ASK, {"role": "assistant", "content": " \n"}]}, "empty_answer", r"nothing but blanks"),
    ({"messages": [user([]), ANSWER]}, "empty_turn", r"text in the user's message 1"),
    ({"messages": [user("<image>"), ANSWER]}, "placeholder", r"as many <image> placeholders as images, got 1 and 0"),
    ({**GOOD, "images": ["x.jpg"]}, "placeholder", r"as many <image> placeholders as images, got 0 and 1"),
    ({"messages": [user("<image>"), ANSWER], "images": ["a", "b"]}, "placeholder", r"got 1 and 2"),
    ({"messages": [user("<video>"), ANSWER], "images": ["a"]}, "placeholder", r"placeholders as images, got 0 and 1"),
    ({"messages": [user([{"type": "video"}]), ANSWER]}, "placeholder", r"as many <video> placeholders as videos, got 1 and 0"),
]


@pytest.mark.parametrize("row, reason, says", BROKEN, ids=lambda value: value if isinstance(value, str) and " " not in value else "")
def test_bad_rows_are_named_with_file_line_and_remedy(write_jsonl, row, reason, says):
    path = write_jsonl([GOOD, row, GOOD])
    with pytest.raises(DataError, match=says) as caught:
        list(read_jsonl(path))
    assert caught.value.reason == reason
    assert str(caught.value).startswith(f"{path}:2: expected")
    assert ", got " in str(caught.value) and "; " in str(caught.value)  # what came, and the remedy


def test_skip_counts_every_bad_row_by_reason(write_jsonl):
    rows = [row for row, _, _ in BROKEN]
    dropped = Counter()
    good = list(read_jsonl(write_jsonl([GOOD, *rows, GOOD]), on_error="skip", dropped=dropped))
    assert len(good) == 2
    assert dropped == Counter(reason for _, reason, _ in BROKEN)
    with pytest.raises(ValueError, match="on_error must be 'strict' .* or 'skip' .*, got 'ignore'"):
        list(read_jsonl("x", on_error="ignore"))


def test_prompts_end_with_the_user(write_jsonl):
    assert texts(as_sample([ASK]), training=False) == [("user", [("text", "Hello")])]
    with pytest.raises(DataError, match="last message to be the user's, got the assistant's; there is no question"):
        as_sample([ASK, ANSWER]).turns(training=False)


def test_other_things_than_samples_are_refused():
    with pytest.raises(DataError, match="^expected a Sample, a row .* got 'hello'"):
        as_sample("hello")
    with pytest.raises(DataError, match="got NoneType|got None"):
        as_sample(None)


def test_a_missing_file_and_an_endless_line_are_data_errors(tmp_path):
    with pytest.raises(DataError, match="nothing.jsonl: expected a readable JSONL file, got No such file"):
        JsonlSource(tmp_path / "nothing.jsonl")
    path = tmp_path / "sparse.jsonl"
    with open(path, "wb") as file:
        file.truncate(2**22)
    source = JsonlSource(path, max_line_bytes=2**20)
    with pytest.raises(DataError, match=r"sparse.jsonl:1: expected at most 1048576 bytes in a line, got 4194304"):
        source[0]
