"""The demo in miniature, from an empty directory to the report; what it does when stopped, repeated or pointed at the wrong place."""

import dataclasses
import json

import pytest

from longvita import cli, presets
from longvita.demo import pretrain
from longvita.demo import run as demo_run
from longvita.demo.plan import make_plan
from longvita.demo.run import Demo
from longvita.model.long_vita import LongVita
from longvita.train import trainer


def miniature():
    """The quick plan with every number as small as it goes."""
    quick = make_plan("quick")
    stages = tuple(
        dataclasses.replace(stage, recipe=dataclasses.replace(stage.recipe, steps=2, global_batch=1, sequence_length=length))
        for stage, length in zip(quick.stages, (256, 384, 512, 640), strict=True)
    )
    return dataclasses.replace(
        quick, vision_steps=2, list_steps=2, text_steps=2, stages=stages, lengths=(256, 640), depths=(0.0, 1.0), questions=1, controls=1
    )


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
        assert grid["needle_removed"]["length"] == grid["stage2_model"]["length"] == 640
    assert "minutes" in said[0] and "Ctrl-C" in said[0]


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


@pytest.mark.parametrize(("recalls_after", "steps"), [(4, 4), (5, 8), (99, 8)])
def test_pretraining_goes_on_until_the_decoder_recalls(recalls_after, steps, monkeypatch):
    """The planned steps, and once more if it does not recall by then."""
    monkeypatch.setattr(pretrain, "RECENT", 1)
    model = LongVita(presets["tiny"]).init_weights(0)
    asked = []

    def loss_at(step):
        asked.append(step)
        return model.head_weight.sum() * 0 + (1.0 if step < recalls_after else 0.01)

    pretrain._fit(model, "text", [], 4, loss_at, "decoder", lambda line: None, goal=0.1)
    assert asked == list(range(1, steps + 1))


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
    grid = len(plan.lengths) * len(plan.depths) * plan.questions
    assert 2 * grid >= 200 and len(plan.depths) * plan.questions >= 50
    with pytest.raises(ValueError, match="expected a plan out of quick, default, full, got 'huge'"):
        make_plan("huge")


@pytest.mark.slow
@pytest.mark.timeout(1800)  # ten minutes on one of two busy cores
def test_the_quick_demo_learns(tmp_path):
    """What a first look shows: images are read, needles found at 2K tokens, and not found where there are none."""
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "out"), "--quiet"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["image_accuracy"] >= 0.8
    for kind in ("video", "text"):
        assert report["needle"][kind]["mean"] >= 0.6
        assert report["needle"][kind]["needle_removed"]["accuracy"] <= 0.25
