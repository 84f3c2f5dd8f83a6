"""python -m bench busy

Training steps of the tiny model, alone and beside a process that keeps one core busy: the rate of both, and what is left of it. "before"
is torch's default, one thread for each core and libgomp's long spin at a barrier; "short spin" limits the spin as the command line does;
"longvita" also gives up threads while other programs keep cores busy (longvita/threads.py), as `longvita train` does. Each is a process
of its own, because the spin is read once; they take turns, so a ratio within a run says more than a rate.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import machine, report
from longvita_kernels import native

SETTLE_SECONDS = 1.2  # not counted: two readings of /proc/stat, after which the number of threads has followed
LEAST_LEFT = 0.4  # goal: of the rate alone, beside a process that keeps one core busy
LEAST_ALONE = 0.97  # goal: of the rate alone before; less than 1 by the noise of a shared machine
IDLE = 0.15  # cores that other programs may take while we measure "alone"
BUSY_LOOP = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How a process shares the cores. spin: GOMP_SPINCOUNT, None for the runtime's own; adapt: follow the free cores."""

    spin: int | None
    adapt: bool


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One training step: documents of equal length in one packed row."""

    documents: int
    length: int
    seconds: float  # of one sample, after it has settled

    @property
    def tokens(self) -> int:
        return self.documents * self.length


WORKLOADS = {
    "small step": Workload(documents=8, length=64, seconds=1.0),
    "8K step": Workload(documents=1, length=8192, seconds=2.0),
}


def policies() -> dict[str, Policy]:
    from longvita.threads import SPIN_COUNT

    return {
        "before": Policy(spin=None, adapt=False),
        "short spin": Policy(spin=SPIN_COUNT, adapt=False),
        "longvita": Policy(spin=SPIN_COUNT, adapt=True),
    }


# ---------------------------------------------------------------------------------------------------------------------------- one process


class Steps:
    """Training steps of one workload. The model is longvita's own: this benchmark measures training and not an op."""

    def __init__(self, workload: Workload):
        import longvita
        from longvita.model.batch import Batch
        from longvita.train import optim
        from longvita.train.recipes import stage2

        config, tokens = longvita.presets["tiny"], workload.tokens
        ids = torch.randint(0, 256, (workload.documents, workload.length), generator=torch.Generator().manual_seed(0))
        batch = Batch.from_ids(ids.tolist())
        self.batch = Batch(
            batch.input_ids, batch.cu_seqlens, batch.sample_cu_seqlens, batch.position_ids, labels=batch.input_ids.clone()
        )  # fmt: skip
        self.model = longvita.LongVita(config).init_weights(0)
        recipe = stage2(sequence_length=tokens, global_batch=1, steps=1, trainable=("text",), dtype="float32")
        self.optimizers = optim.build_optimizers(optim.trained_parts(self.model, recipe), recipe, config.vision.num_layers)
        optim.set_lr(self.optimizers, 0.0)
        self.tokens = tokens

    def step(self) -> None:
        loss, count = self.model.loss(self.batch)
        (loss / count).backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def sample(self, seconds: float, adapt: bool) -> dict:
        """Tokens a second, after a time to settle. The number of threads begins at that of the process."""
        from longvita.threads import AdaptiveThreads, cores_taken, read_usage

        threads = AdaptiveThreads() if adapt else None
        started = time.perf_counter()
        while time.perf_counter() - started < SETTLE_SECONDS:
            self._one(threads)
        before, started, steps = read_usage(), time.perf_counter(), 0
        while time.perf_counter() - started < seconds or steps < 2:
            self._one(threads)
            steps += 1
        took = time.perf_counter() - started
        after, count = read_usage(), torch.get_num_threads()
        if threads is not None:
            torch.set_num_threads(threads.limit)
        taken = None if before is None or after is None else cores_taken(before, after)
        return {"rate": steps * self.tokens / took, "threads": count, "cores_taken": taken}

    def _one(self, threads) -> None:
        self.step()
        if threads is not None:
            threads.adapt()


def serve(lines=sys.stdin) -> None:
    """Takes samples as the parent asks for them: one JSON object a line, in and out."""
    made: dict[str, Steps] = {}
    for line in lines:
        asked = json.loads(line)
        name = asked["workload"]
        if name not in made:
            made[name] = Steps(WORKLOADS[name])
            made[name].step()
        print(json.dumps(made[name].sample(WORKLOADS[name].seconds, asked["adapt"])), flush=True)


# ------------------------------------------------------------------------------------------------------------------------- all processes


class Worker:
    """A process under one policy."""

    def __init__(self, policy: Policy):
        self.policy = policy
        waits = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
        environment = {name: value for name, value in os.environ.items() if name not in waits}
        if policy.spin is not None:
            environment["GOMP_SPINCOUNT"] = str(policy.spin)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.busy"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            cwd=Path(__file__).parents[1],
        )  # fmt: skip

    def sample(self, workload: str) -> dict:
        self.process.stdin.write(json.dumps({"workload": workload, "adapt": self.policy.adapt}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a process of the benchmark ended with code {self.process.wait()}; its message stands above")
        return json.loads(answer)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def busy_core():
    """A process that computes without end. It ends by itself if this one does."""
    process = subprocess.Popen([sys.executable, "-c", BUSY_LOOP])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure(workers: dict[str, Worker], workload: str, rounds: int) -> dict[str, dict[str, list[dict]]]:
    """policy → {"alone", "busy"} → samples. In each round every policy stands once alone and once beside the busy process."""
    found = {name: {"alone": [], "busy": []} for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            found[name]["alone"].append(worker.sample(workload))
        with busy_core():
            for name, worker in workers.items():
                found[name]["busy"].append(worker.sample(workload))
    return found


def result_of(workload: str, samples: dict[str, dict[str, list[dict]]]) -> dict:
    """Medians, and ratios that are taken within a round."""

    def median(name, state, key="rate"):
        return statistics.median(sample[key] for sample in samples[name][state])

    def ratio(over, under):
        pairs = zip(samples[over[0]][over[1]], samples[under[0]][under[1]], strict=True)
        return statistics.median(a["rate"] / b["rate"] for a, b in pairs)

    rows = {
        name: {
            "alone": median(name, "alone"),
            "busy": median(name, "busy"),
            "left": ratio((name, "busy"), (name, "alone")),
            "alone_to_before": ratio((name, "alone"), ("before", "alone")),
            "busy_to_before": ratio((name, "busy"), ("before", "busy")),
            "threads_busy": median(name, "busy", "threads"),
        }
        for name in samples
    }
    others = [sample["cores_taken"] for states in samples.values() for sample in states["alone"]]
    taken = None if None in others else max(others)
    figures = (("left", LEAST_LEFT, "busy ÷ alone"), ("alone_to_before", LEAST_ALONE, "alone ÷ alone before"))
    goals = [
        {"goal": text, "figure": rows["longvita"][key], "at_least": least, "met": rows["longvita"][key] >= least}
        for key, least, text in figures
    ]
    return {"workload": workload, "tokens": WORKLOADS[workload].tokens, "policies": rows, "goals": goals, "cores_taken_alone": taken}


def lines_of(result: dict) -> list[str]:
    """The result as a table."""
    head = f"{result['workload']}, {result['tokens']:,} tokens"
    out = [f"{head:28s} {'alone':>10s} {'busy':>10s}  tokens/s {'busy ÷ alone':>14s} {'alone ÷ before':>15s} {'threads when busy':>18s}"]
    for name, row in result["policies"].items():
        out.append(
            f"    {name:24s} {row['alone']:10,.0f} {row['busy']:10,.0f} {row['left']:24.2f} {row['alone_to_before']:15.2f} "
            f"{row['threads_busy']:18.0f}"
        )
    for goal in result["goals"]:
        met = "met" if goal["met"] else "NOT MET"
        out.append(f"    longvita: {goal['goal']}: {goal['figure']:.2f}, goal at least {goal['at_least']}: {met}")
    taken = result["cores_taken_alone"]
    if taken is not None and taken > IDLE:
        out.append(f"    other programs kept up to {taken:.1f} cores busy while it ran alone: repeat this on an idle machine")
    return out


def _arguments(argv: list[str]) -> argparse.Namespace:
    about, usage = __doc__.split("\n\n")[1], __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m bench busy", description=about, epilog=f"Example: {usage}")
    parser.add_argument("--rounds", type=int, default=2, help="samples of each (default 2: under two minutes on 2 cores)")
    parser.add_argument("--workload", choices=tuple(WORKLOADS), help="only this one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to a file too")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        parser.error(f"rounds is {arguments.rounds}; expected at least 1")
    return arguments


def main(argv: list[str]) -> int:
    arguments = _arguments(argv)
    if native.load() is None:
        print(f"python -m bench: there is nothing to measure: {native.why_missing()}", file=sys.stderr)
        return 2
    out = {"machine": machine.describe(), "rounds": arguments.rounds, "results": []}
    print("{cpu}, {cores} cores, {isa}; torch {torch}; commit {commit}; load {load}".format(**out["machine"]), flush=True)
    with ExitStack() as stack:
        workers = {name: Worker(policy) for name, policy in policies().items()}
        for worker in workers.values():
            stack.callback(worker.close)
        for workload in [arguments.workload] if arguments.workload else WORKLOADS:
            out["results"].append(result_of(workload, measure(workers, workload, arguments.rounds)))
            print(*lines_of(out["results"][-1]), sep="\n", flush=True)
    if arguments.json:
        report.write_json(arguments.json, out)
    print(json.dumps(out, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    serve()
