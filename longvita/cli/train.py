"""`longvita train RUN.json --out DIR`: one stage of training on your own JSONL. The same command goes on where a run was stopped.

The file is described in longvita/cli/run_config.py; `longvita config check RUN.json` checks it without running anything.

On a CPU the number of threads follows the cores that other programs leave free. Set OMP_NUM_THREADS to fix it, for runs that must agree
bit for bit (longvita/threads.py says why).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longvita.cli.errors import UsageError

if TYPE_CHECKING:
    from longvita.cli.run_config import RunConfig

# More text than this changes a small vocabulary no more, and would only take time.
TOKENIZER_CHARACTERS = 20_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        f"{parser.description}\n\nOn a CPU, training uses one thread for each core that other programs leave free.\n"
        "To make runs agree bit for bit, fix the number with OMP_NUM_THREADS."
    )
    parser.add_argument("config", help="run-config JSON: model or init, recipe, data (see the README)")
    parser.add_argument("--out", required=True, metavar="DIR", help="run directory: config, metrics, checkpoints, plots")
    parser.add_argument("--device", help="cpu, cuda, … (default: cpu)")


def run(args: argparse.Namespace) -> None:
    from longvita.cli.run_config import RunConfig

    config = RunConfig.load(args.config)
    device = local_device(args.device)
    with process_group(device) as rank:
        trainer = build_trainer(config, Path(args.out), device=device, quiet=args.quiet)
        if rank == 0:
            trainer.loader.processor.save(args.out)  # chat lays media out as training did
        summary = trainer.train()
    if rank == 0:
        report(Path(args.out), summary, quiet=args.quiet)


def local_device(device: str | None) -> str | None:
    """As given; but "cuda" is a GPU of its own for each of the processes that torchrun started on this machine."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


@contextmanager
def process_group(device: str | None = None) -> Iterator[int]:
    """Joins the other processes when torchrun started us; gives this one's rank."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0
        return
    import torch
    from torch import distributed

    if device is not None and device.startswith("cuda"):
        torch.cuda.set_device(device)  # collectives without a tensor, such as barrier, use the current GPU
    distributed.init_process_group()
    try:
        yield distributed.get_rank()
        distributed.barrier()  # gloo aborts now and then when a peer leaves while its threads still run
    finally:
        distributed.destroy_process_group()


def report(out: Path, summary: dict[str, Any], *, quiet: bool) -> None:
    """The totals in a line, and the loss curve in plots/loss.png."""
    first, last = (summary[key] for key in ("first_loss", "last_loss"))
    losses = f"loss {first:.4f} → {last:.4f}" if first is not None else "no step had a finite loss"
    print(f"{out}: {summary['steps']} steps, {summary['tokens']:,} tokens in {summary['seconds']:.0f} s, {losses}")
    draw_losses(out, quiet=quiet)


def build_trainer(config: RunConfig, out: Path, *, device: str | None = None, quiet: bool = False) -> Any:
    """A Trainer that is ready to go (or to go on, when `out` holds a run)."""
    import longvita
    from longvita.config import LongVitaConfig
    from longvita.data.loader import PackedLoader
    from longvita.data.media import MediaLimits
    from longvita.data.mixture import Source
    from longvita.data.processor import Processor
    from longvita.data.schema import JsonlSource
    from longvita.threads import AdaptiveThreads
    from longvita.train.trainer import Trainer

    recipe = config.recipe
    tokenizer = find_tokenizer(config, out)
    if config.init is not None:
        import torch

        from longvita.cli.runs import last_stage

        model, before = longvita.load(last_stage(config.init), device=device, dtype=torch.float32)
        model_config = model.config
        settings = {"max_tiles": before.max_tiles, "max_fps": before.max_fps, "limits": before.limits}
    else:
        settings = {"limits": MediaLimits()}
        # The ids of the special tokens are the tokenizer's to say.
        model_config = LongVitaConfig.from_dict({**config.model.to_dict(), "tokens": dataclasses.asdict(tokenizer.token_ids)})
        model = longvita.LongVita(model_config, device=device).init_weights(recipe.seed)
    settings |= config.processor | {
        "limits": dataclasses.replace(settings["limits"], **config.processor.get("limits", {}), root=str(config.media_folder()))
    }
    processor = Processor(model_config, tokenizer, **settings)
    sources = [
        Source(JsonlSource(source.path, media_dir=config.media_root), ratio=source.ratio, num=source.num, name=str(source.path))
        for source in config.data
    ]
    loader = PackedLoader(
        sources, processor, recipe.sequence_length,
        reset=recipe.reset, seed=recipe.seed, window=config.window, max_frames=recipe.max_frames, on_error=config.on_error, prefetch=1,
    )  # fmt: skip
    described = [source.describe() for source in sources]
    progress = "quiet" if quiet else "auto"
    return Trainer(
        model, loader, recipe, out,
        config=model_config, tokenizer=tokenizer, progress=progress, data=described, threads=AdaptiveThreads(),
    )  # fmt: skip


def find_tokenizer(config: RunConfig, out: Path) -> Any:
    """The tokenizer named by the configuration, that of the run to start from or to go on with, or a new one trained on the data."""
    from longvita.cli.runs import last_stage
    from longvita.data.template import ChatTokenizer

    known = [config.tokenizer, config.init and last_stage(config.init) / "tokenizer.json", out / "tokenizer.json"]
    for path in known:
        if path and path.exists():
            return ChatTokenizer.from_file(path)
    vocab_size = config.model.text.vocab_size
    if vocab_size > 32768:
        raise UsageError(
            f'this model has a vocabulary of {vocab_size:,} tokens, which needs its own tokenizer: name one with "tokenizer" in the run '
            'config. Only models with up to 32,768 tokens, such as "tiny", get one trained on the data'
        )
    return ChatTokenizer.train_bpe(training_texts(config), vocab_size)


def training_texts(config: RunConfig) -> Iterator[str]:
    """Every text of the data, up to a limit that is enough for a small vocabulary."""
    from longvita.data.schema import read_jsonl

    count = 0
    for source in config.data:
        for sample in read_jsonl(source.path, on_error="skip"):
            for turn in sample.turns():
                for part in turn.parts:
                    if part.kind == "text":
                        yield part.value
                        count += len(part.value)
            if count > TOKENIZER_CHARACTERS:
                return


def draw_losses(run_dir: Path, *, quiet: bool = False) -> None:
    """plots/loss.png of the run; without matplotlib, one line that says how to get it."""
    from longvita.eval.plots import loss_plot
    from longvita.train.metrics import read_metrics

    try:
        loss_plot({run_dir.resolve().name: read_metrics(run_dir / "metrics.jsonl")}, run_dir / "plots" / "loss.png")
    except ModuleNotFoundError as error:
        if not quiet:
            print(f'no loss.png, as {error.name} is not installed: pip install "longvita[plot]"; longvita plot {run_dir}', file=sys.stderr)
