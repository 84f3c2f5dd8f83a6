"""The demo from beginning to end. Every part leaves its result on disk, so that the same command goes on where it was stopped.

DIR/demo.json      which plan and seed this directory belongs to
DIR/material/      images, videos, rows
DIR/pretrained/    the parts that stage 1 starts from
DIR/stage1 … 4/    run directories (config.json, metrics.jsonl, checkpoints/)
DIR/results/       what the evaluation measured, part by part
DIR/report.json, loss.png, needle.png, answers.html
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch

from longvita.data.loader import PackedLoader
from longvita.demo import estimate, evaluate, material, pretrain, report
from longvita.demo.plan import Plan, StagePlan
from longvita.eval import haystack
from longvita.model.checkpoint_io import WEIGHTS, atomic_write_json, load_weights, read_json, save_weights
from longvita.model.loading import find_weights, load
from longvita.model.long_vita import LongVita
from longvita.threads import AdaptiveThreads
from longvita.train.metrics import peak_rss_bytes
from longvita.train.trainer import Trainer, only_writer

Tell = Callable[[str], None]
VERSION = 2  # of the files in results/


class Demo:
    """One demo in one directory."""

    def __init__(self, plan: Plan, out: str | os.PathLike, *, seed: int = 0, progress: str = "auto", tell: Tell = print):
        self.plan, self.out, self.seed, self.progress, self.tell = plan, Path(out).absolute(), seed, progress, tell
        self.material = self.out / "material"
        self.threads = AdaptiveThreads()
        self._claim()
        self.material.mkdir(exist_ok=True)
        self.tokenizer = material.make_tokenizer()
        self.config = material.make_config(self.tokenizer)
        self.processor = material.make_processor(self.config, self.tokenizer, self.material)

    def run(self) -> dict:
        """Does what is still to do and returns the report. One process at a time: ValueError in a second one."""
        with only_writer(self.out):
            return self._run()

    def _run(self) -> dict:
        self.tell(announcement(self.plan, self.out, self.config.num_params()))
        done = [name for name in ("estimate", "material", "pretrained") if (self.out / "results" / f"{name}.json").exists()]
        self.tell(f"done before: {', '.join(done)}" if done else "timing a few steps on this machine …")
        started = time.perf_counter()
        expected = self._once("estimate", self._estimate)
        prepared = self._once("material", self._prepare)
        pretrained = self._once("pretrained", self._pretrain)
        stages = [{"name": stage.name, **self._train(stage)} for stage in self.plan.stages]
        measured = {name: self._once(name, part) for name, part in evaluate.parts(self).items()}
        result = report.assemble(self, expected, prepared, pretrained, stages, measured)
        result["this_run_seconds"] = time.perf_counter() - started
        report.write(self, result)
        return result

    # ---- directory ----

    def _claim(self) -> None:
        """One directory, one demo: a second command with another size must not mix its results in."""
        mine = {"plan": self.plan.name, "seed": self.seed, "version": VERSION}
        path = self.out / "demo.json"
        if path.exists():
            there = read_json(path)
            if there.get("version") != VERSION:
                raise ValueError(f"{self.out} holds a demo that another version of longvita began: choose another --out")
            if there != mine:
                raise ValueError(
                    f"{self.out} holds a demo of plan {there.get('plan')!r} with seed {there.get('seed')}, expected {mine['plan']!r} "
                    f"with seed {self.seed}: choose another --out, or repeat the command that began it"
                )
            return
        if self.out.exists() and any(self.out.iterdir()):
            raise ValueError(f"{self.out} is not empty and holds no demo: choose another --out, or empty it")
        self.out.mkdir(parents=True, exist_ok=True)
        atomic_write_json(path, mine)

    def _once(self, name: str, part: Callable[[], dict]) -> dict:
        """The part's result, from disk if it has been there before."""
        path = self.out / "results" / f"{name}.json"
        if path.exists():
            return read_json(path)
        path.parent.mkdir(exist_ok=True)
        started = time.perf_counter()
        result = part()
        result |= {"seconds": time.perf_counter() - started, "peak_rss_bytes": peak_rss_bytes()}
        atomic_write_json(path, result)
        return result

    def each_step(self) -> None:
        """Before every step of pre-training and every question: as many threads as other programs leave cores."""
        change = self.threads.adapt()
        if change:
            self.tell(f"  {change}")

    # ---- parts ----

    def _estimate(self) -> dict:
        """Times a few steps and says how long everything will take."""
        units = estimate.measure(self)
        parts = estimate.seconds(self.plan, units)
        threads = torch.get_num_threads()
        self.tell(
            f"this machine: {units['short']:.2f} s a step on short texts, {units['long']:.1f} s at {self.plan.context_tokens:,} tokens "
            f"({threads} thread{'s' if threads > 1 else ''}, float32): about {minutes(sum(parts.values()))} in all, "
            "longer if pre-training needs more than one round"
        )
        return {"units": units, "parts": parts, "total": sum(parts.values()), "threads": threads, "machine": report.machine()}

    def _prepare(self) -> dict:
        self.tell("material: writing images, videos and texts")
        shutil.rmtree(self.material, ignore_errors=True)  # half-written by a run that was stopped
        self.material.mkdir()
        self.processor.save(self.material)
        material.write_images(self.material)
        rows = {}
        for stage in self.plan.stages:
            path = material.write_stage(self.material, stage, self.processor, self.seed)
            with open(path, encoding="utf-8") as file:
                rows[stage.name] = sum(1 for _ in file)
        train, held_out = haystack.load_digits()
        return {"rows": rows, "images": {"train": len(train), "held_out": len(held_out)}}

    def _pretrain(self) -> dict:
        plan, folder = self.plan, self.out / "pretrained"
        self.tell("pre-training the two parts that the real model gets from InternViT and Qwen2.5 (no published ones are this small)")
        model = LongVita(self.config)
        # Text first: another draw of the decoder draws the whole model.
        text = pretrain.pretrain_text(model, self.processor, plan.pretrain, plan.context_tokens, self.seed, self.tell, self.each_step)
        pretrain.pretrain_vision(model, haystack.load_digits()[0], plan.pretrain.vision_steps, self.seed, self.tell, self.each_step)
        folder.mkdir(exist_ok=True)
        self.processor.save(folder)
        self.config.save(folder / "config.json")
        save_weights(model, folder / WEIGHTS)
        return {"vision_steps": plan.pretrain.vision_steps, **text}

    def _train(self, stage: StagePlan) -> dict:
        recipe, run_dir = stage.recipe, self.out / stage.name
        self.tell(
            f"{stage.name}: {' + '.join(recipe.trainable)} at {recipe.sequence_length} tokens, {recipe.steps} steps, samples "
            f"{'kept apart' if recipe.reset else 'joined'}"
        )
        before = self.out / "pretrained" if stage.number == 1 else self.out / f"stage{stage.number - 1}"
        model = LongVita(self.config)
        load_weights(model, find_weights(before))
        rows = os.fspath(self.material / f"{stage.name}.jsonl")
        loader = PackedLoader(
            rows, self.processor, recipe.sequence_length, reset=recipe.reset, seed=self.seed + stage.number, max_frames=recipe.max_frames,
            on_error="skip", prefetch=4,
        )  # fmt: skip
        trainer = Trainer(
            model,
            loader,
            recipe,
            run_dir,
            config=self.config,
            tokenizer=self.tokenizer,
            progress=self.progress,
            data={"plan": self.plan.name},
            threads=self.threads,
        )
        run_dir.mkdir(exist_ok=True)
        self.processor.save(run_dir)
        summary = trainer.train()
        return {
            **summary,
            "sequence_length": recipe.sequence_length,
            "global_batch": recipe.global_batch,
            "trainable": list(recipe.trainable),
        }

    def model_of(self, stage: int):
        """(model, processor) as the stage left them; the processor may read any path."""
        return load(self.out / f"stage{stage}")


def announcement(plan: Plan, out: Path, params: int) -> str:
    """What the demo is about to do."""
    contexts = " → ".join(f"{stage.recipe.sequence_length:,}" for stage in plan.stages)
    return (
        f"Long-VITA in small ({plan.name}): {params:,} parameters, four stages at {contexts} tokens.\n"
        f"It writes digits as JPEG and MP4 and English text, pre-trains a tiny vision tower and decoder, trains stages 1 to 4, and "
        f"then asks\nquestions about held-out images, videos and texts. Results go to {out}.\n"
        "Ctrl-C stops it; the same command resumes (an unfinished pre-training starts over)."
    )


def minutes(seconds: float) -> str:
    """ "9 minutes", "1.5 minutes"."""
    return f"{seconds / 60:.0f} minutes" if seconds >= 300 else f"{seconds / 60:.1f} minutes"
