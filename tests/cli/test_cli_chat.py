"""`longvita chat` with an untrained tiny model: what goes in and comes out, not whether it is true."""

import pytest
from tiny_run import make_image, make_video

from longvita.cli.chat import media_part
from longvita.cli.errors import UsageError


@pytest.fixture
def media(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_image(tmp_path / "a.png")
    make_video(tmp_path / "clip")
    (tmp_path / "note.txt").write_text("Rome is a capital.\n", encoding="utf-8")
    return tmp_path


def test_one_question_about_everything(longvita, tiny_run, media):
    words = ["chat", "--run", tiny_run, "--image", "a.png", "--video", "clip", "--text-file", "note.txt", "--max-new-tokens", "5"]
    first = longvita(*words, "--prompt", "Which digit is this?")
    assert first.code == 0, first.err
    assert first.out.endswith("\n") and len(first.out) > 1 and first.err == ""
    assert longvita(*words, "--prompt", "Which digit is this?").out == first.out


def test_text_alone_and_sampling(longvita, tiny_run):
    words = ["chat", "--run", tiny_run / "stage4", "--prompt", "Hello", "--max-new-tokens", "6", "--temperature", "2", "--top-k", "200"]
    words += ["--top-p", "0.95", "--repetition-penalty", "1.1", "--system", "Be brief."]
    one = longvita(*words, "--seed", "1")
    assert one.code == 0, one.err
    assert longvita(*words, "--seed", "1").out == one.out
    assert {longvita(*words, "--seed", str(seed)).out for seed in range(2, 6)} != {one.out}


def test_a_conversation_from_a_pipe(longvita, tiny_run, media):
    lines = "/image a.png\nWhat is this?\n\n/reset\n/text note.txt\nHello\n/help\n/exit\nnever reached\n"
    result = longvita("chat", "--run", tiny_run, "--max-new-tokens", "3", stdin=lines)
    assert result.code == 0, result.err
    assert "(a.png goes with the next question)" in result.out and "(note.txt goes with" in result.out
    assert "/reset" in result.out and "you:" not in result.out
    quiet = longvita("chat", "--run", tiny_run, "--max-new-tokens", "3", "--quiet", stdin="/image a.png\nWhat is this?\n")
    assert "goes with" not in quiet.out and quiet.out.strip()


def test_the_conversation_is_remembered(longvita, tiny_run, monkeypatch):
    import longvita as package

    seen = []

    def generate(model, processor, messages, **options):
        seen.append(messages)
        return iter(["so", "so"])

    monkeypatch.setattr(package, "generate", generate, raising=False)
    result = longvita("chat", "--run", tiny_run, "--system", "Be brief.", stdin="One?\nTwo?\n/reset\nThree?\n")
    assert result.out == "soso\n" * 3
    roles = [[message["role"] for message in messages] for messages in seen]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"]]
    assert seen[1][2]["content"] == [{"type": "text", "text": "soso"}]


@pytest.mark.parametrize("blank", ["", " ", "\n"])
def test_a_blank_answer_does_not_lock_the_conversation(longvita, tiny_run, monkeypatch, blank):
    import longvita as package

    seen = []

    def generate(model, processor, messages, **options):
        seen.append([message["role"] for message in messages])
        return iter([blank])

    monkeypatch.setattr(package, "generate", generate, raising=False)
    assert longvita("chat", "--run", tiny_run, stdin="One?\nTwo?\n").code == 0
    assert seen == [["user"], ["user"]]


def test_a_mistake_in_a_conversation_costs_one_message(longvita, tiny_run, media):
    (media / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    lines = "/image nowhere.png\n/paint\n/image\n/image broken.png\nWhat?\nHello\n"
    result = longvita("chat", "--run", tiny_run, "--max-new-tokens", "3", stdin=lines)
    messages = result.err.splitlines()
    assert len(messages) == 4 and all(line.startswith("longvita chat: ") for line in messages)
    assert "nowhere.png: no such image file" in messages[0]
    assert "unknown command /paint; known: /image /video" in messages[1]
    assert "/image needs the path of a file" in messages[2]
    assert "broken.png" in messages[3]
    assert result.out.splitlines()[-1].strip() and result.code == 2  # Hello was answered; the pipe's reader learns of the mistakes


def test_bad_input_is_one_message(longvita, tiny_run, media):
    (media / "latin.txt").write_bytes(b"caf\xe9")
    for words, message in (
        (["--image", "nowhere.png"], "nowhere.png: no such image file"),
        (["--text-file", "nowhere.txt"], "nowhere.txt: cannot read this text file: No such file"),
        (["--text-file", "latin.txt"], "expected a text file in UTF-8, got other bytes at position 3"),
        (["--max-new-tokens", "0"], "must be at least 1"),
        (["--temperature", "-1"], "temperature must be 0"),
        (["--video", "note.txt"], "note.txt"),
    ):
        result = longvita("chat", "--run", tiny_run, "--prompt", "What?", *words)
        assert result.code == 2 and message in result.err and len(result.err.splitlines()) == 1, result.err
    result = longvita("chat", "--run", media, "--prompt", "What?")
    assert result.code == 2 and "is no run directory" in result.err


def test_the_media_root_is_a_wall(longvita, tiny_run, media):
    inside = media / "inside"
    inside.mkdir()
    make_image(inside / "b.png")
    words = ["chat", "--run", tiny_run, "--prompt", "What?", "--max-new-tokens", "2", "--media-root", inside]
    assert longvita(*words, "--image", "b.png").code == 0
    outside = longvita(*words, "--image", "../a.png")
    assert outside.code == 2 and "media root" in outside.err


def test_media_parts(media):
    assert media_part("text", "note.txt") == {"type": "text", "text": "Rome is a capital.\n\n"}
    assert media_part("image", "a.png") == {"type": "image", "image": "a.png"}
    with pytest.raises(UsageError, match="no such video file below sub"):
        media_part("video", "clip", "sub")


def test_ctrl_c_at_a_terminal_stops_an_answer_not_the_conversation(tiny_run, capsys, monkeypatch):
    """At a terminal: the first Ctrl-C comes during an answer, the second at the prompt, then Ctrl-D."""
    import builtins
    import sys

    import longvita as package
    from longvita import cli

    asked = []

    def generate(model, processor, messages, **options):
        asked.append([message["role"] for message in messages])
        yield "so"
        if len(asked) == 1:
            raise KeyboardInterrupt
        yield " far"

    typed = iter(["One?", KeyboardInterrupt(), "Two?", EOFError()])

    def prompt(text=""):
        answer = next(typed)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(package, "generate", generate, raising=False)
    monkeypatch.setattr(builtins, "input", prompt)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert cli.main(["chat", "--run", str(tiny_run)]) == 0
    out = capsys.readouterr().out
    assert "so\n\n(/exit or Ctrl-D leaves)\nso far\n" in out
    assert asked == [["user"], ["user", "assistant", "user"]]
