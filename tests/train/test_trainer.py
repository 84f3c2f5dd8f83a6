"""The step: normalisation, accumulation, clipping, empty steps, the non-finite guard, what is written and what is said."""

import dataclasses
import json
import math

import pytest
import torch

from longvita.config import LongVitaConfig
from longvita.data.template import ChatTokenizer
from longvita.model.batch import Batch
from longvita.train.metrics import read_metrics
from longvita.train.recipes import stage1, stage3
from longvita.train.trainer import NonFiniteError, Trainer
from tests.train.support import CONFIG, TOKENS, Rows, assert_close, assert_same_bits, make_model, make_row, make_trainer, recipe, weights


def step_gradients(trainer) -> dict[str, torch.Tensor]:
    """The gradients one step hands to the optimizer (clipping out of reach: see clip=)."""
    trainer._gradients()
    return {name: parameter.grad.clone() for name, parameter in trainer.trained.items()}


UNEVEN = [make_row(0, supervised=30), make_row(1, supervised=3), make_row(2, supervised=11), make_row(3, supervised=1)]


def test_accumulating_four_rows_equals_one_row_of_four(tmp_path):
    joined = Batch.join(UNEVEN)
    one = step_gradients(make_trainer(tmp_path / "one", rows=[joined], global_batch=1, sequence_length=4 * TOKENS, clip=1e9))
    four = step_gradients(make_trainer(tmp_path / "four", rows=UNEVEN, global_batch=4, clip=1e9))
    assert_close(four, one)


def test_loss_is_the_mean_over_all_supervised_tokens(tmp_path):
    """Against plain autograd of sum / count; and the row mean, which weighs a row with one token like a row with thirty."""
    model = make_model()
    losses = [model.loss(row) for row in UNEVEN]
    counts = [count for _, count in losses]
    assert counts == [30, 3, 11, 1]
    model.zero_grad()
    (sum(loss for loss, _ in losses) / sum(counts)).backward()
    token = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    (sum(loss / count for loss, count in (model.loss(row) for row in UNEVEN)) / 4).backward()
    by_row = {name: p.grad.clone() for name, p in model.named_parameters()}

    trainer = make_trainer(tmp_path / "token", rows=UNEVEN, global_batch=4, clip=1e9)
    loss, norm, supervised, tokens, problem = trainer._gradients()
    assert_close({name: p.grad for name, p in trainer.trained.items()}, token)
    assert loss == pytest.approx(sum(value.item() for value, _ in losses) / 45, rel=1e-6)
    assert norm == pytest.approx(float(torch.stack([g.norm() for g in token.values()]).norm()), rel=1e-5)
    assert (supervised, tokens, problem) == (45, 4 * TOKENS, None)

    trainer = make_trainer(tmp_path / "row", rows=UNEVEN, global_batch=4, clip=1e9, loss_normalisation="row")
    loss = trainer._gradients()[0]
    assert_close({name: p.grad for name, p in trainer.trained.items()}, by_row)
    assert loss == pytest.approx(sum(value.item() / count for value, count in losses) / 4, rel=1e-6)


@pytest.mark.parametrize("normalisation", ["token", "row"])
def test_rows_without_supervision_change_nothing(tmp_path, normalisation):
    empty = make_row(9, supervised=0)
    options = {"clip": 1e9, "loss_normalisation": normalisation}
    alone = step_gradients(make_trainer(tmp_path / "a", rows=UNEVEN[:2], global_batch=2, **options))
    mixed = step_gradients(make_trainer(tmp_path / "b", rows=[empty, UNEVEN[0], empty, UNEVEN[1]], global_batch=4, **options))
    assert_same_bits(alone, mixed)


def test_clipping_scales_to_the_norm(tmp_path):
    free = make_trainer(tmp_path / "free", clip=1e9)
    norm = free._gradients()[1]
    clip = norm / 3
    clipped = make_trainer(tmp_path / "clipped", clip=clip)
    assert clipped._gradients()[1] == norm  # reported as it was before
    grads = [p.grad for p in clipped.trained.values()]
    assert float(torch.stack([g.norm() for g in grads]).norm()) == pytest.approx(clip, rel=1e-5)
    assert_close({n: p.grad * 3 for n, p in clipped.trained.items()}, {n: p.grad for n, p in free.trained.items()}, 1e-5)
    assert_same_bits(
        step_gradients(make_trainer(tmp_path / "x", clip=norm * 1.01)), {n: p.grad for n, p in free.trained.items()}
    )  # below the limit nothing is touched


def test_a_step_with_nothing_supervised(tmp_path):
    model = make_model()
    before = weights(model)
    rows = [make_row(seed, supervised=0) for seed in range(2)]
    summary = make_trainer(tmp_path, rows=rows, model=model, steps=2, optimizer="muon").train()
    assert_same_bits(before, weights(model))
    for row in read_metrics(tmp_path / "metrics.jsonl"):
        assert row["loss"] == 0 and row["grad_norm"] == 0 and row["supervised_tokens"] == 0 and row["skipped"] == "nothing supervised"
    assert summary["skipped_steps"] == 2 and summary["first_loss"] is None and summary["tokens"] == 4 * TOKENS


def test_a_row_that_no_trained_part_touches_has_gradient_zero(tmp_path):
    """Stage 1 trains the projector alone; a row without an image still counts."""
    text, mixed = dataclasses.replace(make_row(8), images=None, image_indices=None), make_row(9)
    options = {"trainable": ("projector",), "clip": 1e9}
    alone = make_trainer(tmp_path / "a", rows=[text], global_batch=1, **options)
    loss, norm, supervised, _, problem = alone._gradients()
    assert loss > 0 and norm == 0 and supervised == TOKENS // 2 and problem is None
    assert not any(p.grad.any() for p in alone.trained.values())
    together = step_gradients(make_trainer(tmp_path / "b", rows=[text, mixed], global_batch=2, **options))
    halves = step_gradients(make_trainer(tmp_path / "c", rows=[mixed], global_batch=1, **options))
    assert_close({name: 2 * grad for name, grad in together.items()}, halves)


def test_only_the_recipes_parts_move(tmp_path):
    model = make_model()
    before = weights(model)
    make_trainer(tmp_path, model=model, trainable=("projector",), steps=2).train()
    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert moved == set(model.part("projector"))
    assert all(p.grad is None for name, p in model.named_parameters() if name not in moved)


def test_learning_lowers_the_loss_and_recompute_changes_no_bit(tmp_path):
    rows = [make_row(0), make_row(1)]
    runs = {}
    for name, options in {"plain": {}, "recompute": {"recompute": ("vision", "projector", "text")}}.items():
        model = make_model()
        summary = make_trainer(tmp_path / name, rows=rows, model=model, steps=12, lr=3e-3, optimizer="muon", **options).train()
        assert summary["last_loss"] < summary["first_loss"] - 0.1
        runs[name] = weights(model)
    assert_same_bits(runs["plain"], runs["recompute"])


def test_bfloat16_is_autocast_over_float32_weights(tmp_path):
    model = make_model()
    trainer = make_trainer(tmp_path / "bf16", model=model, dtype="bfloat16", clip=1e9)
    low = step_gradients(trainer)
    high = step_gradients(make_trainer(tmp_path / "fp32", clip=1e9))
    assert all(grad.dtype == torch.float32 for grad in low.values())
    together = [torch.cat([grads[name].flatten() for name in high]) for grads in (low, high)]
    relative = (together[0] - together[1]).norm() / together[1].norm()
    assert 1e-4 < relative < 0.1  # rounded, and only rounded
    trainer.train()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {v.dtype for o in trainer.optimizers for s in o.state.values() for v in s.values()} == {torch.float32}


# ---- guard ----


def test_a_non_finite_gradient_stops_the_update_and_names_the_culprit(tmp_path, capsys):
    model = make_model()
    before = weights(model)
    name = "model.layers.1.mlp.up_proj.weight"
    calls = []

    def poison(grad):
        calls.append(0)
        return grad * float("nan") if len(calls) in (1, 2) else grad  # both rows of step 1

    dict(model.named_parameters())[name].register_hook(poison)
    seen = []
    trainer = make_trainer(
        tmp_path, model=model, steps=2, on_step=lambda step, row: seen.append(torch.equal(weights(model)[name], before[name]))
    )
    summary = trainer.train()
    assert seen == [True, False]  # no update in step 1, one in step 2
    error = capsys.readouterr().err
    assert f"step 1, rank 0: the gradient is not finite, first bad parameter: {name}; no optimizer step taken (1 in a row" in error
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == ["non-finite", None]
    assert rows[0]["grad_norm"] is None and math.isfinite(rows[0]["loss"]) and summary["skipped_steps"] == 1


def test_endless_non_finite_steps_abort(tmp_path, capsys):
    model = make_model()
    with torch.no_grad():
        model.head_weight[3] = float("inf")
    before = weights(model)
    with pytest.raises(NonFiniteError, match=r"step 3, rank 0: the loss is not finite, first bad parameter.*\(3 in a row.*last good step"):
        make_trainer(tmp_path, model=model, steps=9, max_bad_steps=3).train()
    assert capsys.readouterr().err.count("the loss is not finite") == 3
    assert_same_bits(before, weights(model))
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [None] * 3
    assert not list((tmp_path).glob("checkpoints/step-*"))


def test_good_steps_in_between_reset_the_count(tmp_path, capsys):
    model = make_model()
    bad_rows = {1, 2, 5, 6}
    count = [0]

    def poison(grad):
        count[0] += 1
        return grad * float("nan") if count[0] in bad_rows else grad

    model.head_weight.register_hook(poison)
    summary = make_trainer(tmp_path, model=model, steps=4, max_bad_steps=2).train()
    assert summary["skipped_steps"] == 2 and summary["steps"] == 4


# ---- files, messages, input ----


def test_run_directory(tmp_path):
    tokenizer = ChatTokenizer.train_bpe(["some text"], vocab_size=300)
    trainer = Trainer(
        make_model(), Rows([make_row(0)]), recipe(steps=3), tmp_path / "run", config=CONFIG, tokenizer=tokenizer, progress="quiet",
        data=[{"path": "x.jsonl"}],
    )  # fmt: skip
    summary = trainer.train()
    described = json.loads((tmp_path / "run" / "config.json").read_text())
    assert described["recipe"]["name"] == "stage2" and described["data"] == [{"path": "x.jsonl"}]
    assert LongVitaConfig.load(tmp_path / "run" / "config.json") == CONFIG
    assert len(ChatTokenizer.from_file(tmp_path / "run" / "tokenizer.json")) == len(tokenizer)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    expected = {
        "step", "loss", "lr", "grad_norm", "tokens", "supervised_tokens", "tokens_per_second", "fill_rate", "dropped", "peak_rss_bytes",
        "seconds", "threads", "skipped",
    }  # fmt: skip
    assert set(rows[0]) == expected
    assert rows[0]["tokens"] == 2 * TOKENS and rows[0]["fill_rate"] == 1.0 and rows[0]["dropped"] == {"too long": 3}
    assert rows[-1]["lr"] == pytest.approx(recipe(steps=3).min_lr)
    assert summary["steps"] == 3 and summary["tokens"] == 6 * TOKENS and summary["peak_rss_bytes"] > 2**20
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000003"]


def test_on_step_and_progress(tmp_path, capsys):
    seen = []
    make_trainer(tmp_path, steps=3, log_every=2, progress="lines", on_step=lambda step, row: seen.append((step, row["step"]))).train()
    assert seen == [(1, 1), (2, 2), (3, 3)]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    assert all(word in lines[0] for word in ("loss", "tokens/s", "fill", "peak", "ETA"))
    with pytest.raises(ValueError, match="progress: expected one of"):
        make_trainer(tmp_path / "other", progress="loud")


def test_epochs_go_on_and_empty_data_is_an_error(tmp_path):
    seen = []
    loader = Rows([make_row(0), make_row(1), make_row(2)])
    make_trainer(tmp_path / "a", rows=loader.rows, steps=4, on_step=lambda step, row: seen.append(step)).train()  # 8 rows out of 3
    assert seen == [1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"the data gave no packed row of 48 tokens .* dropped samples by reason: \{'too long': 3\}"):
        make_trainer(tmp_path / "b", rows=[]).train()


def test_bad_batches_are_explained(tmp_path):
    row = make_row(0)
    row.input_ids[5] = 10_000
    with pytest.raises(ValueError, match="input_ids must lie in 0 … 79, got 10000"):
        make_trainer(tmp_path, rows=[row]).train()
    unlabelled = Batch(**{**vars(make_row(0)), "labels": None})
    with pytest.raises(ValueError, match="no labels"):
        make_trainer(tmp_path, rows=[unlabelled]).train()


def test_two_processes_cannot_share_a_run_directory(tmp_path):
    def start_another(step, row):
        with pytest.raises(ValueError, match="another process is working in .*: wait for it, or choose another"):
            make_trainer(tmp_path, steps=2).train()

    make_trainer(tmp_path, steps=2, on_step=start_another).train()


def test_published_stages_run_in_small(tmp_path):
    """The stages themselves, only smaller: which parts move follows from the stage."""
    for stage, parts in ((stage1, ("projector",)), (stage3, ("projector", "text"))):
        model = make_model()
        before = weights(model)
        small = stage(sequence_length=TOKENS, global_batch=1, steps=1)
        Trainer(model, Rows([make_row(0)]), small, tmp_path / small.name, config=CONFIG, progress="quiet").train()
        moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
        assert moved and moved <= {name for part in parts for name in model.part(part)}


def test_a_loader_that_is_already_split_is_refused(tmp_path):
    loader = Rows([make_row(0)])
    loader.world_size = 2
    with pytest.raises(ValueError, match="give every rank a loader of the whole data"):
        Trainer(make_model(), loader, recipe(), tmp_path, config=CONFIG, progress="quiet")
