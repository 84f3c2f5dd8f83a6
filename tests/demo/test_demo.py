"""The demo in miniature, from an empty directory to the report; what it does when stopped, repeated or pointed at the wrong place."""

import dataclasses
import json
import re
import shutil
import types

import pytest

from longvita import cli
from longvita.demo import estimate, pretrain
from longvita.demo import plan as demo_plan
from longvita.demo import report as demo_report
from longvita.demo import run as demo_run
from longvita.demo.plan import Goals, PretrainPlan, make_plan
from longvita.demo.run import Demo
from longvita.train import trainer


def miniature():
    """The quick plan with every number as small as it goes."""
    quick = make_plan("quick")
    stages = tuple(
        dataclasses.replace(stage, recipe=dataclasses.replace(stage.recipe, steps=2, global_batch=1, sequence_length=length))
        for stage, length in zip(quick.stages, (256, 384, 512, 640), strict=True)
    )
    pretrain_plan = PretrainPlan(vision_steps=2, list_steps=2, text_steps=2, rounds=1, draws=1, recall_goal=0.0)
    return dataclasses.replace(
        quick, pretrain=pretrain_plan, stages=stages, lengths=(256, 640), depths=(0.0, 1.0), goals=Goals(images=0.0, video=0.0, text=0.0),
        questions=1, full_questions=2, controls=1, stage2_controls=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    said = []
    return Demo(miniature(), out, progress="quiet", tell=said.append).run(), out, said


def test_the_report_has_what_was_promised(finished):
    report, out, said = finished
    assert json.loads((out / "report.json").read_text()) == report
    assert [stage["name"] for stage in report["stages"]] == ["stage1", "stage2", "stage3", "stage4"]
    for stage in report["stages"]:
        assert stage["steps"] == 2 and stage["tokens"] > 0 and stage["seconds"] > 0
        assert stage["first_loss"] > 0 and stage["last_loss"] > 0 and stage["skipped_steps"] == 0
    assert report["context_tokens"] == 640 and report["peak_rss_bytes"] > 2**27
    assert 0 <= report["image_accuracy"] <= 1 and report["image_questions"] == 360
    for kind in ("video", "text"):
        grid = report["needle"][kind]
        assert grid["lengths"] == [256, 640] and grid["depths"] == [0.0, 1.0]
        assert len(grid["accuracy"]) == 2 and all(len(row) == 2 for row in grid["accuracy"])
        assert grid["needle_removed"]["length"] == grid["stage2_model"]["length"] == grid["full_length"]["length"] == 640
        assert grid["full_length"]["questions"] == 4 and grid["needle_removed"]["questions"] == grid["stage2_model"]["questions"] == 2
        low, high = grid["full_length"]["interval"]
        assert 0 <= low <= grid["full_length"]["accuracy"] <= high <= 1
    assert report["learned"] == {"recall": True, "images": True, "video": True, "text": True}
    assert "Ctrl-C" in said[0]


def test_an_estimate_is_made_before_the_work_and_kept_beside_the_time_it_took(finished):
    report, _, said = finished
    assert re.search(r"this machine: .* threads?, float32\): about [\d.]+ minutes in all", said[2])
    estimated = report["estimated"]
    assert set(estimated["parts"]) == set(estimate.PARTS) < set(report["seconds"])
    assert all(value > 0 for value in [*estimated["parts"].values(), *estimated["units"].values(), report["seconds"]["total"]])
    assert estimated["total"] == sum(estimated["parts"].values())


def test_twice_the_work_takes_longer():
    units = {"short": 0.2, "vision": 0.1, "long": 1.5, "read": 0.5}
    plan = make_plan("default")
    once = estimate.seconds(plan, units)
    twice = estimate.seconds(plan, {name: 2 * value for name, value in units.items()})
    assert {name: 2 * value for name, value in once.items()} == pytest.approx(twice)
    more = dataclasses.replace(plan, full_questions=2 * plan.full_questions)
    longer = estimate.seconds(more, units)
    assert longer["evaluation"] > once["evaluation"] and longer["training"] == once["training"]


def test_the_pictures_and_the_page_are_there(finished):
    _, out, _ = finished
    for name in ("loss.png", "needle.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    page = (out / "answers.html").read_text()
    assert page.count("Which digit is this?") == 10 and page.count("class='sheet'") == 3 and page.count("<mark>") == 3
    assert "<script" not in page and "http" not in page


def test_material_is_real_files(finished):
    _, out, _ = finished
    assert len(list((out / "material" / "images" / "train").glob("*.jpg"))) == 1437
    assert len(list((out / "material" / "images" / "held_out").glob("*.jpg"))) == 360
    rows = [json.loads(line) for line in (out / "material" / "stage4.jsonl").read_text().splitlines()]
    for row in rows:
        for path in row.get("videos", []):
            assert (out / "material" / path).read_bytes()[4:8] == b"ftyp"


def test_stages_train_what_they_should(finished):
    _, out, _ = finished
    from safetensors.numpy import load_file

    def weights(folder):
        return load_file(next(iter((out / folder).rglob("model.safetensors"))) if folder == "pretrained" else out / folder / newest)

    newest = "checkpoints/step-000002/model.safetensors"
    before, first, second, third = (weights(name) for name in ("pretrained", "stage1", "stage2", "stage3"))
    changed = {name for name in before if (before[name] != first[name]).any()}
    assert changed and all(name.startswith("model.vision_projection.") for name in changed)
    assert any((first[n] != second[n]).any() for n in first if n.startswith("model.vision_model."))
    assert not any((second[n] != third[n]).any() for n in second if n.startswith("model.vision_model."))


def test_what_was_not_learned_is_said_and_ends_with_code_one(tmp_path, monkeypatch, capsys):
    """Goals that nothing can reach: every draw and round is tried, the rest of the demo runs, and nobody can miss the outcome."""
    possible = miniature()
    harder = dataclasses.replace(possible.pretrain, recall_goal=1.01, draws=2)
    impossible = dataclasses.replace(possible, goals=Goals(images=1.01, video=0.0, text=1.01), pretrain=harder)
    monkeypatch.setattr(demo_plan, "make_plan", lambda name, seed: impossible)
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert "NOT LEARNED in 2 rounds from 2 draws of the weights" in said.err
    assert "pre-training: NOT LEARNED, text 0.00" in said.out and "NOT LEARNED: recall, images, text. Try another --seed" in said.out
    assert re.search(r"held-out images: .* NOT LEARNED \(goal 1.01\)", said.out)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["learned"] == {"recall": False, "images": False, "video": True, "text": False}
    assert report["pretraining"]["draws"] == 2 and report["pretraining"]["rounds"] == 2 and not report["pretraining"]["learned"]
    assert (tmp_path / "out" / "answers.html").read_text().count("NOT LEARNED") == 2


@pytest.mark.parametrize(
    ("passes_at", "rounds", "draws", "learned"),
    [(1, 1, 1, True), (2, 2, 1, True), (3, 3, 2, True), (4, 4, 2, True), (99, 4, 2, False)],
)
def test_pretraining_goes_on_until_the_test_is_passed(passes_at, rounds, draws, learned, monkeypatch):
    """Another round, then another draw of the weights, up to the plan's bound."""
    asked, drawn = [], []
    monkeypatch.setattr(pretrain, "held_out_tests", lambda *_: None)
    monkeypatch.setattr(pretrain, "Lessons", lambda *_: types.SimpleNamespace(lists=None, texts=None))
    monkeypatch.setattr(pretrain, "recall_init", lambda model, processor, seed: drawn.append(seed))
    monkeypatch.setattr(pretrain, "fit", lambda *_: None)
    monkeypatch.setattr(pretrain, "recall", lambda *_: asked.append(0) or {"text": float(len(asked) >= passes_at), "video": 1.0})
    plan = PretrainPlan(vision_steps=1, list_steps=3, text_steps=5, rounds=2, draws=2)
    result = pretrain.pretrain_text(None, None, plan, 640, 7, lambda _: None)
    assert (result["rounds"], result["draws"], result["learned"]) == (rounds, draws, learned)
    assert result["text_steps"] == 5 * rounds + 3 * draws
    assert drawn[0] == 7 and len(set(drawn)) == draws


@pytest.mark.parametrize(("diverging", "learned"), [({0}, True), ({0, 1}, False)])
def test_a_draw_that_diverges_costs_a_draw_and_not_the_demo(diverging, learned, monkeypatch):
    drawn, said = [], []

    def fit(model, part, extra, steps, *_):
        if len(drawn) - 1 in diverging and steps == 5:
            raise pretrain.Diverged("the loss was nan")

    monkeypatch.setattr(pretrain, "held_out_tests", lambda *_: None)
    monkeypatch.setattr(pretrain, "Lessons", lambda *_: types.SimpleNamespace(lists=None, texts=None))
    monkeypatch.setattr(pretrain, "recall_init", lambda model, processor, seed: seed in drawn or drawn.append(seed))
    monkeypatch.setattr(pretrain, "fit", fit)
    monkeypatch.setattr(pretrain, "recall", lambda *_: {"text": float(len(drawn) - 1 not in diverging), "video": 1.0})
    plan = PretrainPlan(vision_steps=1, list_steps=3, text_steps=5, rounds=2, draws=2)
    result = pretrain.pretrain_text(None, None, plan, 640, 7, said.append)
    assert (result["learned"], result["draws"]) == (learned, 2) and result["recall"]["text"] == learned
    assert said[:2] == ["  the loss was nan", "  again, with newly drawn weights"]


def test_a_control_above_chance_fails_the_demo(finished, monkeypatch, capsys, tmp_path):
    report, _, _ = finished
    assert report["above_chance"] == []
    assert not demo_report.above_chance({"accuracy": 0.2, "questions": 50}), "10 of 50: 1 in 40 by chance"
    assert demo_report.above_chance({"accuracy": 0.3, "questions": 50}), "15 of 50: 1 in 14,000 by chance"
    monkeypatch.setattr(Demo, "run", lambda self: {**report, "above_chance": ["text"]})
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "out"), "--quiet"]) == 1
    assert "CONTROL FAILED: without the needle the model answers more text questions than by chance" in capsys.readouterr().out


def test_threads_are_adapted_while_questions_are_asked(finished, monkeypatch, tmp_path):
    """Nothing is left to train here: whoever asks then asks before a question."""
    _, out, _ = finished
    shutil.copytree(out, tmp_path / "out")
    for name in ("images", "removed_text"):
        (tmp_path / "out" / "results" / f"{name}.json").unlink()
    demo = Demo(miniature(), tmp_path / "out", progress="quiet", tell=lambda _: None)
    readings = []
    monkeypatch.setattr(demo.threads, "adapt", lambda: readings.append(1) and None)
    demo.run()
    assert len(readings) == 360 + 2


def test_the_directory_of_another_version_is_refused(tmp_path):
    (tmp_path / "demo.json").write_text(json.dumps({"plan": "quick", "seed": 0, "version": 1}))
    with pytest.raises(ValueError, match="holds a demo that another version of longvita began: choose another --out"):
        Demo(miniature(), tmp_path)


def test_repeating_the_command_trains_and_measures_nothing_again(finished, monkeypatch):
    report, out, _ = finished
    monkeypatch.setattr(trainer.Trainer, "_train_step", lambda self: pytest.fail("a finished stage was trained again"))
    monkeypatch.setattr(demo_run.pretrain, "recall_init", lambda *_: pytest.fail("pre-trained again"))
    again = Demo(miniature(), out, progress="quiet", tell=lambda _: None).run()
    assert {**again, "this_run_seconds": 0} == {**report, "this_run_seconds": 0}


def test_an_interrupted_demo_goes_on_to_the_same_result(finished, tmp_path, monkeypatch):
    report, _, _ = finished
    out = tmp_path / "out"
    step = trainer.Trainer._train_step

    def interrupted(self):
        if self.recipe.name == "stage3" and self.step == 1:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(trainer.Trainer, "_train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Demo(miniature(), out, progress="quiet", tell=lambda _: None).run()
    monkeypatch.setattr(trainer.Trainer, "_train_step", step)
    resumed = Demo(miniature(), out, progress="quiet", tell=lambda _: None).run()
    for stage, expected in zip(resumed["stages"], report["stages"], strict=True):
        assert (stage["first_loss"], stage["last_loss"], stage["tokens"]) == (
            expected["first_loss"], expected["last_loss"], expected["tokens"],
        )  # fmt: skip
    assert resumed["needle"]["text"]["accuracy"] == report["needle"]["text"]["accuracy"]


def test_two_demos_do_not_share_a_directory(tmp_path):
    demo = Demo(miniature(), tmp_path, progress="quiet", tell=lambda _: None)
    with trainer.only_writer(tmp_path), pytest.raises(ValueError, match="another process is working in .*: wait for it, or choose another"):
        demo.run()


def test_another_demo_s_directory_is_refused(finished):
    _, out, _ = finished
    with pytest.raises(ValueError, match="holds a demo of plan 'quick' with seed 0, expected 'quick' with seed 5: choose another --out"):
        Demo(miniature(), out, seed=5)


def test_a_directory_with_something_else_in_it_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("x")
    assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 2
    assert "is not empty and holds no demo: choose another --out" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_plans_derive_from_the_published_stages():
    plan = make_plan("default")
    contexts = [stage.recipe.sequence_length for stage in plan.stages]
    assert contexts[-1] == 8192 and contexts[1] < contexts[2] < contexts[3]
    assert [stage.recipe.trainable for stage in plan.stages] == [
        ("projector",), ("vision", "projector", "text"), ("projector", "text"), ("projector", "text"),
    ]  # fmt: skip
    assert [stage.recipe.reset for stage in plan.stages] == [True, True, False, False]
    assert plan.grid_questions == (10, 10, 10, 20) and len(plan.depths) * plan.full_questions == 100
    with pytest.raises(ValueError, match="expected one of quick, default, full as the plan, got 'huge'"):
        make_plan("huge")


@pytest.mark.slow
@pytest.mark.timeout(1800)  # ten minutes on one of two busy cores
def test_the_quick_demo_learns(tmp_path):
    """What a first look shows: images are read, needles found at 2K tokens, and not found where there are none."""
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "out"), "--quiet"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())  # exit code 0: the plan's goals are reached
    controls = [report["needle"][kind]["needle_removed"] for kind in ("video", "text")]
    assert sum(part["questions"] for part in controls) == 100
    assert sum(part["accuracy"] * part["questions"] for part in controls) <= 20  # by chance: more in 1 of 1,200 runs
