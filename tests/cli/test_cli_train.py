"""`longvita train`: from a run-config file to a run directory that chats, and on from there."""

import json

import pytest
from tiny_run import make_image

ROWS = [
    {"messages": [{"role": "user", "content": "What is the capital of Italy?"}, {"role": "assistant", "content": "Rome."}]},
    {"messages": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A ramp."}], "images": ["a.png"]},
    {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello!"}]},
]
RECIPE = {"stage": 2, "steps": 2, "sequence_length": 256, "global_batch": 1, "lr": 1e-3, "min_lr": 1e-4, "dtype": "float32", "log_every": 1}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """train.jsonl, an image and a function that writes run.json."""
    monkeypatch.chdir(tmp_path)
    make_image(tmp_path / "a.png")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def write(**changes):
        data = {"model": {"preset": "tiny", "text": {"num_layers": 1}}, "recipe": RECIPE, "data": ["train.jsonl"], **changes}
        (tmp_path / "run.json").write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
        return tmp_path / "run.json"

    return write


def test_train_resume_chat_and_go_on(longvita, project, tmp_path):
    run = tmp_path / "runs" / "one"
    result = longvita("train", project(), "--out", run)
    assert result.code == 0, result.err
    assert result.out.startswith(f"{run}: 2 steps, ") and "loss" in result.out
    assert "stage2 1/2" in result.err and "\r" not in result.err
    assert (run / "plots" / "loss.png").stat().st_size > 10_000
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert json.loads((run / "config.json").read_text())["model"]["text"]["num_layers"] == 1

    again = longvita("train", project(), "--out", run, "--quiet")
    assert again.code == 0 and again.err == ""
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2

    changed = longvita("train", project(recipe={**RECIPE, "lr": 1e-2}), "--out", run)
    assert changed.code == 2 and "written with another configuration (recipe.lr: 0.001 then, 0.01 now" in changed.err

    answer = longvita("chat", "--run", run, "--image", "a.png", "--prompt", "What?", "--max-new-tokens", "3")
    assert answer.code == 0, answer.err

    next_stage = project(model=None, init="runs/one", recipe={**RECIPE, "stage": 3})
    result = longvita("train", next_stage, "--out", tmp_path / "runs" / "two", "--quiet")
    assert result.code == 0, result.err
    assert (tmp_path / "runs" / "two" / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    assert longvita("config", "check", tmp_path / "runs" / "two").out.startswith(f"{tmp_path / 'runs' / 'two'}: ok: ")


def test_the_processor_is_kept_and_handed_on(longvita, project, tmp_path):
    def settings(name, **changes):
        result = longvita("train", project(recipe={**RECIPE, "steps": 1}, **changes), "--out", tmp_path / name, "--quiet")
        assert result.code == 0, result.err
        return json.loads((tmp_path / name / "processor.json").read_text())

    one = settings("one", processor={"max_tiles": 2, "limits": {"max_seconds": 60, "image_formats": ["PNG"]}})
    assert (one["max_tiles"], one["max_fps"], one["limits"]["max_seconds"], one["limits"]["image_formats"]) == (2, 1.0, 60, ["PNG"])
    assert "root" not in one["limits"]
    two = settings("two", model=None, init="one", processor={"max_fps": 2, "limits": {"max_seconds": 30}})
    assert two == {**one, "max_fps": 2.0, "limits": {**one["limits"], "max_seconds": 30}}


def test_each_process_of_torchrun_has_its_own_gpu(monkeypatch):
    from longvita.cli.train import local_device

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert local_device("cuda") == "cuda" and local_device(None) is None
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [local_device(name) for name in ("cuda", "cuda:1", "cpu", None)] == ["cuda:3", "cuda:1", "cpu", None]


def test_a_bad_row_stops_with_file_and_line_or_is_counted(longvita, project, tmp_path):
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write('{"messages": [}\n')
    result = longvita("train", project(), "--out", tmp_path / "run", "--quiet")
    assert result.code == 2 and f"{tmp_path / 'train.jsonl'}:4" in result.err
    assert len(result.err.splitlines()) == 1
    result = longvita("train", project(on_error="skip"), "--out", tmp_path / "run", "--quiet")
    assert result.code == 0, result.err
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["dropped"] == {"json": last["dropped"]["json"]} and last["dropped"]["json"] >= 1


def test_a_picture_outside_the_media_root_is_refused(longvita, project, tmp_path):
    (tmp_path / "media").mkdir()
    result = longvita("train", project(media_root="media"), "--out", tmp_path / "run", "--quiet")
    assert result.code == 2 and "a.png" in result.err and "train.jsonl" in result.err
    make_image(tmp_path / "media" / "a.png")
    assert longvita("train", project(media_root="media"), "--out", tmp_path / "run", "--quiet").code == 0


def test_a_large_model_needs_its_own_tokenizer(longvita, project, tmp_path):
    result = longvita("train", project(model="1b"), "--out", tmp_path / "run")
    assert result.code == 2
    assert 'a vocabulary of 152,064 tokens, which needs its own tokenizer: name one with "tokenizer"' in result.err
    assert not (tmp_path / "run").exists()


def test_ctrl_c_says_what_is_saved(longvita, project, tmp_path, monkeypatch):
    from longvita.train.trainer import Trainer

    def interrupted(self):
        raise KeyboardInterrupt("stopped after step 1 of 2; saved step-000001; run the same command again to resume there")

    monkeypatch.setattr(Trainer, "train", interrupted)
    result = longvita("train", project(), "--out", tmp_path / "run")
    assert result.code == 130
    assert "interrupted: stopped after step 1 of 2; saved step-000001; run the same command again" in result.err


def test_without_matplotlib_training_still_ends_well(longvita, project, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = longvita("train", project(), "--out", tmp_path / "run")
    assert result.code == 0, result.err
    assert 'pip install "longvita[plot]"' in result.err


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_share_the_rows_and_one_reports(project, tmp_path):
    import os
    import subprocess
    import sys

    path = project(recipe={**RECIPE, "global_batch": 2})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "longvita.cli"]
    done = subprocess.run(
        [*command, "train", str(path), "--out", "runs/two", "--quiet"], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("runs/two: 2 steps, ") == 1
    assert len((tmp_path / "runs" / "two" / "metrics.jsonl").read_text().splitlines()) == 2
