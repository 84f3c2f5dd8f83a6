"""report.json and the three things to look at: loss.png, needle.png, answers.html. Every share and time is a measurement of this run."""

from __future__ import annotations

import base64
import html
import io
import math
import os
import platform
import re
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from longvita.data.schema import Sample
from longvita.demo.rows import image_path
from longvita.eval import haystack
from longvita.eval.needle import CHANCE, KINDS, score
from longvita.eval.plots import loss_plot, needle_plot
from longvita.infer.engine import generate
from longvita.model.checkpoint_io import atomic_write_bytes, atomic_write_json
from longvita.train.metrics import read_metrics

CONTROL_ALARM = 0.001  # how rarely a control at chance may look as if it were above
EXAMPLE_SEED = 77


def assemble(demo, expected: dict, prepared: dict, pretrained: dict, stages: list[dict], measured: dict[str, dict]) -> dict:
    """The dictionary that report.json holds."""
    needle = {}
    for kind in KINDS:
        removed, stage2 = measured[f"removed_{kind}"], measured[f"stage2_{kind}"]
        needle[kind] = {
            **measured[f"needle_{kind}"],
            "full_length": {"length": measured[f"needle_{kind}"]["lengths"][-1], **measured[f"needle_{kind}"]["by_length"][-1]},
            "needle_removed": {"length": removed["lengths"][0], **removed["by_length"][0]},
            "stage2_model": {"length": stage2["lengths"][0], **stage2["by_length"][0]},
        }
    goals = demo.plan.goals
    evaluation = sum(part["seconds"] for part in measured.values())
    training = sum(stage["seconds"] for stage in stages)
    return {
        "plan": demo.plan.name,
        "seed": demo.seed,
        "parameters": demo.config.num_params(),
        "context_tokens": demo.plan.context_tokens,
        "goals": {"recall": demo.plan.pretrain.recall_goal, **asdict(goals)},
        "learned": {
            "recall": pretrained["learned"],
            "images": measured["images"]["accuracy"] >= goals.images,
            **{kind: needle[kind]["full_length"]["accuracy"] >= getattr(goals, kind) for kind in KINDS},
        },
        "above_chance": [kind for kind in KINDS if above_chance(needle[kind]["needle_removed"])],  # a control that fails
        "image_accuracy": measured["images"]["accuracy"],
        "image_interval": measured["images"]["interval"],
        "image_accuracy_stage2": measured["images_stage2"]["accuracy"],
        "image_questions": measured["images"]["questions"],
        "needle": needle,
        "chance": CHANCE,
        "stages": stages,
        "pretraining": pretrained,
        "material": prepared,
        "seconds": {
            "material": prepared["seconds"], "pretraining": pretrained["seconds"], "training": training, "evaluation": evaluation,
            "estimate": expected["seconds"],  # what it took to estimate the rest
            "total": expected["seconds"] + prepared["seconds"] + pretrained["seconds"] + training + evaluation,
        },
        "estimated": {key: expected[key] for key in ("total", "parts", "units", "threads")},
        "peak_rss_bytes": max(part["peak_rss_bytes"] for part in [expected, prepared, pretrained, *stages, *measured.values()]),
        "machine": expected["machine"],
    }  # fmt: skip


def above_chance(part: dict) -> bool:
    """Whether this many right answers come from guessing with a probability below CONTROL_ALARM."""
    asked = part["questions"]
    right = round(part["accuracy"] * asked)
    chances = (math.comb(asked, count) * CHANCE**count * (1 - CHANCE) ** (asked - count) for count in range(right, asked + 1))
    return sum(chances) < CONTROL_ALARM


def machine() -> dict:
    """What computed: the processor, the instruction sets in use (and what caps them, if anything does), and the rate of torch.mm."""
    from longvita_kernels import native

    return {
        "system": f"{platform.system()} {platform.machine()}", "processor": processor_name(), "python": platform.python_version(),
        "torch": torch.__version__, "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_capability_cap": os.environ.get("ATEN_CPU_CAPABILITY"), "threads": torch.get_num_threads(),
        "instruction_set": native.isa() if native.load() else None, "instruction_set_cap": os.environ.get("LONGVITA_ISA"),
        "matmul_gflops": matmul_gflops(),
    }  # fmt: skip


def processor_name() -> str:
    """As Linux names it."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def matmul_gflops(size: int = 1024, times: int = 10) -> float:
    """The rate of a float32 matrix product of `size` × `size` on torch's threads, the median of some: the machine's ceiling here."""
    a = torch.ones(size, size)
    took = []
    for _ in range(times):
        start = time.perf_counter()
        a @ a
        took.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(took) / 1e9


def lines(report: dict, out: Path) -> list[str]:
    """The result in a few lines for the terminal."""
    needle, seconds, learned = report["needle"], report["seconds"], report["learned"]
    text = []
    if not learned["recall"]:
        text.append(f"pre-training: NOT LEARNED, {shares(report['pretraining']['recall'])} recalled from held-out short texts")
    text.append(f"held-out images: {report['image_accuracy']:.3f} right ({report['image_questions']} questions){verdict(report, 'images')}")
    for kind in KINDS:
        grid = needle[kind]
        full, removed = grid["full_length"], grid["needle_removed"]
        parts = zip(grid["lengths"], grid["by_length"], strict=True)
        by_length = ", ".join(f"{length:,}: {part['accuracy']:.2f}" for length, part in parts)
        text.append(
            f"{kind} needle{' (whole codes)' if kind == 'text' else ''} by tokens: {by_length}{verdict(report, kind)}\n"
            f"  at {full['length']:,} tokens {interval(full)}; needle removed {interval(removed)}; stage 2's model "
            f"{interval(grid['stage2_model'])}; chance {report['chance']}"
        )
    text.append(
        f"{seconds['total'] / 60:.1f} minutes in all (estimate: {report['estimated']['total'] / 60:.1f}), "
        f"{report['peak_rss_bytes'] / 2**30:.2f} GiB of memory at most"
    )
    text.append(f"report: {out / 'report.json'}   pictures: loss.png, needle.png   answers: {out / 'answers.html'}")
    run, image = os.path.relpath(out), os.path.relpath(out / "material" / image_path("held_out", 7))
    text.append(f'talk to it: longvita chat --run {run} --image {image} --prompt "{haystack.IMAGE_QUESTION}"')
    for kind in report["above_chance"]:
        text.append(
            f"CONTROL FAILED: without the needle the model answers more {kind} questions than by chance, so its score does not show that "
            "it found the needle"
        )
    missing = [name for name, reached in learned.items() if not reached]
    if missing:
        longer = "" if report["plan"] == "full" else ", or --full for longer training"
        text.append(f"NOT LEARNED: {', '.join(missing)}. Try another --seed{longer}, with a new --out directory")
    return text


def verdict(report: dict, name: str) -> str:
    """Empty if the goal was reached, else a note that it was not."""
    return "" if report["learned"][name] else f"  NOT LEARNED (goal {report['goals'][name]:.2f})"


def interval(part: dict) -> str:
    """ "0.92 (0.85 to 0.96)": a share with its 95 % interval."""
    low, high = part["interval"]
    return f"{part['accuracy']:.2f} ({low:.2f} to {high:.2f})"


def shares(recall: dict) -> str:
    return ", ".join(f"{kind} {value:.2f}" for kind, value in recall.items())


def write(demo, report: dict) -> None:
    """Writes all four files."""
    out = demo.out
    losses = {f"stage {stage.number}": read_metrics(out / stage.name / "metrics.jsonl") for stage in demo.plan.stages}
    loss_plot(losses, out / "loss.png", title="Training loss, stages 1 to 4")
    needle_plot(report["needle"], out / "needle.png", chance=report["chance"])
    atomic_write_bytes(out / "answers.html", page(demo, report).encode())
    atomic_write_json(out / "report.json", report)


# ---- answers.html ----


def page(demo, report: dict) -> str:
    """A page that needs nothing else: what was asked, what was answered, and the pictures inside it."""
    model, processor = demo.model_of(demo.plan.stages[-1].number)
    rng = np.random.default_rng(EXAMPLE_SEED)

    def ask(messages) -> str:
        return "".join(generate(model, processor, messages, max_new_tokens=16))

    sections = [
        (
            "Images",
            f"{report['image_accuracy']:.1%} of {report['image_questions']} held-out digits read correctly{verdict(report, 'images')}. "
            "Ten of them, chosen at random:",
            image_cards(demo, rng, ask),
        ),
        ("Long videos", _needle_words(report, "video"), video_cards(demo, processor, rng, ask)),
        ("Long texts", _needle_words(report, "text"), text_cards(demo, processor, rng, ask)),
    ]
    body = "".join(f"<h2>{title}</h2><p>{words}</p><div class='cards'>{''.join(cards)}</div>" for title, words, cards in sections)
    pictures = "".join(
        f"<img class='wide' alt='{name}' src='{_data_url((demo.out / name).read_bytes(), 'png')}'>" for name in ("loss.png", "needle.png")
    )
    threads = report["machine"]["threads"]
    summary = (
        f"{report['parameters']:,} parameters, {report['context_tokens']:,} tokens of context, trained and measured in "
        f"{report['seconds']['total'] / 60:.0f} minutes on {threads} thread{'s' if threads > 1 else ''}. "
        "Everything asked here was held out of training."
    )
    return f"<!doctype html><html lang='en'><meta charset='utf-8'><title>Long-VITA in small</title><style>{STYLE}</style><body>" \
        f"<h1>Long-VITA in small</h1><p>{summary}</p>{body}<h2>The run</h2>{pictures}</body></html>\n"  # fmt: skip


def _needle_words(report: dict, kind: str) -> str:
    grid = report["needle"][kind]
    full, removed = grid["full_length"], grid["needle_removed"]
    hay = "One frame of the video has a red border" if kind == "video" else "Somewhere in the text there is a code"
    return (
        f"{hay}. At {full['length']:,} tokens {full['accuracy']:.0%} of {full['questions']} questions are answered correctly"
        f"{verdict(report, kind)}; with the needle removed {removed['accuracy']:.0%} (chance is {report['chance']:.0%}), and by the model "
        f"of stage 2, which never saw more than {report['stages'][1]['sequence_length']:,} tokens, {grid['stage2_model']['accuracy']:.0%}."
    )


def image_cards(demo, rng: np.random.Generator, ask) -> list[str]:
    digits = haystack.load_digits()[1]
    cards = []
    for number in rng.choice(len(digits), size=10, replace=False):
        path = demo.material / image_path("held_out", number)
        answer = ask(Sample([{"role": "user", "content": "<image>\n" + haystack.IMAGE_QUESTION}], images=[os.fspath(path)]))
        picture = f"<img class='digit' alt='a handwritten digit' src='{_data_url(path.read_bytes(), 'jpeg')}'>"
        cards.append(_card(picture, haystack.IMAGE_QUESTION, answer, str(digits.labels[number])))
    return cards


def video_cards(demo, processor, rng: np.random.Generator, ask) -> list[str]:
    """Every frame of the video as one contact sheet, in reading order."""
    hay = haystack.VideoHay(haystack.load_digits()[1])
    cards = []
    folder = demo.out / "examples"
    folder.mkdir(exist_ok=True)
    for depth in (0.1, 0.5, 0.9):
        frames, digit = hay.frames(haystack.video_frames(processor, demo.plan.context_tokens), rng, depth=depth)
        path = folder / f"video-{int(depth * 100):02d}.mp4"
        haystack.write_video(path, frames)
        answer = ask(haystack.video_turns(path, digit)[:1])
        name = f"examples/{path.name}"
        link = f"<p><a href='{name}'>{name}</a>, {len(frames)} frames, one a second</p>"
        cards.append(
            _card(
                f"<img class='sheet' alt='all frames' src='{contact_sheet(frames)}'>{link}",
                haystack.VIDEO_QUESTION,
                answer,
                str(digit),
                wide=True,
            )
        )
    return cards


def text_cards(demo, processor, rng: np.random.Generator, ask) -> list[str]:
    """The neighbourhood of the fact, with the length of what lies around it."""
    hay = haystack.TextHay(haystack.load_prose()[1], processor.tokenizer)
    cards = []
    for depth in (0.1, 0.5, 0.9):
        needle = haystack.text_needle(hay, processor, demo.plan.context_tokens - 16, rng, depth=depth)
        question = needle.sample.messages[0]["content"]
        answer = ask(needle.sample.messages[:1])
        body, _, asked = question.rpartition("\n")
        fact = re.search(haystack.TEXT_FACT.format(name="[A-Z][a-z]+", digit=r"\d"), body)
        before, after = body[: fact.start()], body[fact.end() :]
        near = f"{html.escape(before[-220:])}<mark>{fact[0]}</mark>{html.escape(after[:220])}"
        shown = f"<p class='text'><i>{len(before):,} characters</i> … {near} … <i>{len(after):,} characters</i></p>"
        cards.append(_card(shown, asked, answer, needle.answer, wide=True))
    return cards


def contact_sheet(frames_FSS3: np.ndarray, columns: int = 35) -> str:
    """All frames on one sheet, as a data URL."""
    from PIL import Image

    size = frames_FSS3.shape[1]
    rows = -(-len(frames_FSS3) // columns)
    sheet = np.full((rows * size, columns * size, 3), 255, np.uint8)
    for number, frame in enumerate(frames_FSS3):
        top, left = number // columns * size, number % columns * size
        sheet[top : top + size, left : left + size] = frame
    file = io.BytesIO()
    Image.fromarray(sheet).save(file, "JPEG", quality=80)
    return _data_url(file.getvalue(), "jpeg")


def _card(material: str, question: str, answer: str, expected: str, *, wide: bool = False) -> str:
    right = score(answer, expected)
    verdict = "<span class='right'>right</span>" if right else f"<span class='wrong'>wrong: {expected}</span>"
    return (
        f"<div class='card{' wide' if wide else ''}'>{material}<p class='q'>{html.escape(question)}</p>"
        f"<p class='a'>{html.escape(answer.strip()) or '(nothing)'} {verdict}</p></div>"
    )


def _data_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2em auto; padding: 0 1em }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2em }
.cards { display: flex; flex-wrap: wrap; gap: 12px }
.card { border: 1px solid #ddd; border-radius: 8px; padding: 12px; width: 190px } .card.wide { width: 100% }
.digit { width: 96px; image-rendering: pixelated; display: block; margin: 0 auto } .sheet, .wide > img, img.wide { width: 100% }
.q { color: #555; margin: .5em 0 0 } .a { font-weight: 600; margin: 0 } .text { color: #444 } i { color: #888 }
mark { background: #ffe08a } .right { color: #00714f; margin-left: .5em } .wrong { color: #b3261e; margin-left: .5em }
"""
