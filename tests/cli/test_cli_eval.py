"""`longvita eval needle`: arguments, files and the table; the measurement itself is tested in tests/eval."""

import json
import sys
import types

import pytest

from longvita.cli.eval import table

RESULT = {
    "lengths": [1024, 8192], "depths": [0.0, 1.0], "accuracy": [[1.0, 0.75], [0.5, None]], "questions": 12, "mean": 0.75,
    "by_length": [
        {"accuracy": 0.875, "questions": 8, "interval": [0.529, 0.978]}, {"accuracy": 0.5, "questions": 4, "interval": [0.15, 0.85]},
    ],
}  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    """Replaces the measurement; holds the arguments it was called with."""
    calls = []

    def evaluate_run(run_dir, **options):
        calls.append((run_dir, options))
        if options["progress"]:
            options["progress"]("video 1024")
        return {kind: RESULT for kind in options["kinds"]}

    monkeypatch.setitem(sys.modules, "longvita.eval.needle", types.SimpleNamespace(evaluate_run=evaluate_run, CHANCE=0.1))
    return calls


def test_arguments_reach_the_measurement(longvita, asked, tiny_run, tmp_path):
    out, picture = tmp_path / "a" / "needle.json", tmp_path / "needle.png"
    result = longvita(
        "eval", "needle", tiny_run, "--kind", "video", "--lengths", "8K,1024", "--depths", "1,0", "--questions", "12", "--seed", "3",
        "--out", out, "--plot", picture,
    )  # fmt: skip
    assert result.code == 0, result.err
    ((run_dir, options),) = asked
    assert run_dir == tiny_run / "stage4"
    assert options.pop("progress") is not None and options.pop("each_question") is not None
    assert options == {"kinds": ("video",), "lengths": [1024, 8192], "depths": [0.0, 1.0], "questions": 12, "seed": 3}
    assert json.loads(out.read_text()) == {"video": RESULT}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert result.out.splitlines() == table("video", RESULT) and result.err == "video 1024\n"


def test_defaults_and_quiet(longvita, asked, tiny_run):
    result = longvita("eval", "needle", tiny_run, "--quiet")
    ((_, options),) = asked
    options.pop("each_question")()
    assert options == {"kinds": ("video", "text"), "lengths": None, "depths": None, "questions": 200, "seed": 0, "progress": None}
    assert result.err == "" and "text needle" in result.out


def test_the_table():
    assert table("text", RESULT) == [
        "text needle, share of whole codes: 0.750 of 12 questions",
        "tokens \\ depth    0.00   1.00    all (95 % interval)",
        "         1,024    1.00   0.75   0.88 (0.53–0.98)",
        "         8,192    0.50      –   0.50 (0.15–0.85)",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lengths", "1k,x"], "expected token counts like 1024,2K,8K; got 'x'"),
        (["--lengths", "0"], "expected token counts"),
        (["--depths", "0,2"], "depths go from 0"),
        (["--depths", "a"], "expected shares from 0"),
        (["--questions", "0"], "expected a whole number of at least 1, got '0'"),
        (["--kind", "sound"], "invalid choice"),
    ],
)
def test_wrong_arguments(longvita, asked, tiny_run, words, message):
    result = longvita("eval", "needle", tiny_run, *words)
    assert result.code == 2 and message in result.err and asked == []


def test_a_directory_that_is_no_run(longvita, asked, tmp_path):
    result = longvita("eval", "needle", tmp_path)
    assert result.code == 2 and "is no run directory" in result.err and asked == []
