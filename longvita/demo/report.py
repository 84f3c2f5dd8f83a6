"""report.json and the three things to look at: loss.png, needle.png, answers.html. Every number is a measurement of this run."""

from __future__ import annotations

import base64
import html
import io
import os
import platform
import re
from pathlib import Path

import numpy as np
import torch

from longvita.data.schema import Sample
from longvita.demo.rows import image_path
from longvita.eval import haystack
from longvita.eval.needle import KINDS, score
from longvita.eval.plots import loss_plot, needle_plot
from longvita.infer.engine import generate
from longvita.model.checkpoint_io import atomic_write_bytes, atomic_write_json
from longvita.train.metrics import read_metrics

CHANCE = 0.1
EXAMPLE_SEED = 77


def assemble(demo, prepared: dict, pretrained: dict, stages: list[dict], measured: dict[str, dict]) -> dict:
    """The report's dictionary, as design and README describe it."""
    needle = {}
    for kind in KINDS:
        removed, stage2 = measured[f"removed_{kind}"], measured[f"stage2_{kind}"]
        needle[kind] = {
            **measured[f"needle_{kind}"],
            "full_length_accuracy": float(np.mean(measured[f"needle_{kind}"]["accuracy"][-1])),
            "needle_removed": {"length": removed["lengths"][0], "accuracy": removed["mean"], "questions": removed["questions"]},
            "stage2_model": {"length": stage2["lengths"][0], "accuracy": stage2["mean"], "questions": stage2["questions"]},
        }
    evaluation = sum(part["seconds"] for part in measured.values())
    training = sum(stage["seconds"] for stage in stages)
    return {
        "plan": demo.plan.name,
        "seed": demo.seed,
        "parameters": demo.config.num_params(),
        "context_tokens": demo.plan.context_tokens,
        "image_accuracy": measured["images"]["accuracy"],
        "image_accuracy_stage2": measured["images_stage2"]["accuracy"],
        "image_questions": measured["images"]["questions"],
        "needle": needle,
        "chance": CHANCE,
        "stages": stages,
        "pretraining": pretrained,
        "material": prepared,
        "seconds": {
            "material": prepared["seconds"], "pretraining": pretrained["seconds"], "training": training, "evaluation": evaluation,
            "total": prepared["seconds"] + pretrained["seconds"] + training + evaluation,
        },
        "peak_rss_bytes": max(part["peak_rss_bytes"] for part in [prepared, pretrained, *stages, *measured.values()]),
        "machine": machine(),
    }  # fmt: skip


def machine() -> dict:
    from longvita_kernels import native

    return {
        "system": f"{platform.system()} {platform.machine()}", "python": platform.python_version(), "torch": torch.__version__,
        "threads": torch.get_num_threads(), "instruction_set": native.isa() if native.load() else None,
    }  # fmt: skip


def lines(report: dict, out: Path) -> list[str]:
    """The result in a few lines for the terminal."""
    needle, seconds = report["needle"], report["seconds"]
    text = [f"held-out images: {report['image_accuracy']:.3f} right ({report['image_questions']} questions)"]
    for kind in KINDS:
        grid = needle[kind]
        by_length = ", ".join(f"{length:,}: {np.mean(row):.2f}" for length, row in zip(grid["lengths"], grid["accuracy"], strict=True))
        text.append(
            f"{kind} needle by tokens: {by_length}  (needle removed: {grid['needle_removed']['accuracy']:.2f}, stage 2's model at full "
            f"length: {grid['stage2_model']['accuracy']:.2f}, chance {report['chance']})"
        )
    total = seconds["total"] / 60
    text.append(f"{total:.1f} minutes in all, {report['peak_rss_bytes'] / 2**30:.2f} GiB of memory at most")
    text.append(f"report: {out / 'report.json'}   pictures: loss.png, needle.png   answers: {out / 'answers.html'}")
    text.append(f'talk to it: longvita chat --run {os.path.relpath(out)} --image digit.jpg --prompt "{haystack.IMAGE_QUESTION}"')
    return text


def write(demo, report: dict) -> None:
    """Writes all four files."""
    out = demo.out
    loss_plot({stage.name: read_metrics(out / stage.name / "metrics.jsonl") for stage in demo.plan.stages}, out / "loss.png")
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
            f"{report['image_accuracy']:.1%} of {report['image_questions']} held-out digits read correctly.",
            image_cards(demo, rng, ask),
        ),
        ("Long videos", _needle_words(report, "video"), video_cards(demo, processor, rng, ask)),
        ("Long texts", _needle_words(report, "text"), text_cards(demo, processor, rng, ask)),
    ]
    body = "".join(f"<h2>{title}</h2><p>{words}</p><div class='cards'>{''.join(cards)}</div>" for title, words, cards in sections)
    pictures = "".join(
        f"<img class='wide' alt='{name}' src='{_data_url((demo.out / name).read_bytes(), 'png')}'>" for name in ("loss.png", "needle.png")
    )
    summary = (
        f"{report['parameters']:,} parameters, {report['context_tokens']:,} tokens of context, trained and measured in "
        f"{report['seconds']['total'] / 60:.0f} minutes on {report['machine']['threads']} threads. "
        "Everything asked here was held out of training."
    )
    return f"<!doctype html><html lang='en'><meta charset='utf-8'><title>Long-VITA in small</title><style>{STYLE}</style><body>" \
        f"<h1>Long-VITA in small</h1><p>{summary}</p>{body}<h2>The run</h2>{pictures}</body></html>\n"  # fmt: skip


def _needle_words(report: dict, kind: str) -> str:
    grid = report["needle"][kind]
    hay = "One frame of the video has a red border" if kind == "video" else "Somewhere in the text a code is told"
    return (
        f"{hay}. At {grid['lengths'][-1]:,} tokens {grid['full_length_accuracy']:.0%} of the questions are answered correctly; with the "
        f"needle removed {grid['needle_removed']['accuracy']:.0%} (chance is {report['chance']:.0%}), and by the model of stage 2, which "
        f"never saw more than a fraction of that length, {grid['stage2_model']['accuracy']:.0%}."
    )


def image_cards(demo, rng: np.random.Generator, ask) -> list[str]:
    digits = haystack.load_digits()[1]
    cards = []
    for number in rng.choice(len(digits), size=10, replace=False):
        path = demo.material / image_path("held_out", number)
        answer = ask(Sample([{"role": "user", "content": "<image>\n" + haystack.IMAGE_QUESTION}], images=[os.fspath(path)]))
        picture = f"<img class='digit' alt='a handwritten digit' src='{_data_url(path.read_bytes(), 'jpeg')}'>"
        cards.append(_card(picture, haystack.IMAGE_QUESTION, answer, int(digits.labels[number])))
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
                digit,
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
        cards.append(_card(shown, asked, answer, needle.digit, wide=True))
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


def _card(material: str, question: str, answer: str, digit: int, *, wide: bool = False) -> str:
    right = score(answer, digit)
    verdict = "<span class='right'>right</span>" if right else f"<span class='wrong'>wrong: {digit}</span>"
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
