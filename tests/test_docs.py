"""README and CONTRIBUTING are run: Python blocks as they stand, commands in their order, in a folder that has what they speak of.

Expensive commands are checked as far as they cost nothing: `make` with -n, `longvita demo` and `eval` by their arguments; `train` takes 2
steps.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tiny_run import make_image, make_run

import longvita_kernels
from bench import __main__ as bench
from longvita import cli
from longvita.data.schema import read_jsonl

ROOT = Path(__file__).resolve().parents[1]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")}
PARSED_ONLY = {"demo", "eval"}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)


def commands(page):
    return [line.split(" # ")[0].strip() for block in blocks(page, "bash") for line in block.splitlines() if line.strip()]


def clip(path):
    """A short MP4 of 3 frames, one per second."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for i in range(3):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 80 * i, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A demo's result, a picture, a video, and the files that the README tells to save."""
    folder = tmp_path_factory.mktemp("readme")
    run = make_run(folder / "demo-out" / "stage4")
    rows = [{"step": step, "loss": 2.0 / step, "lr": 1e-3, "tokens_per_second": 1e3} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_image(folder / "digit.jpg")
    clip(folder / "clip.mp4")
    for place, name in (("material/images/held_out", "0007.jpg"), ("examples", "video-50.mp4")):  # where the demo keeps them
        (folder / "demo-out" / place).mkdir(parents=True)
        shutil.copy(folder / ("digit.jpg" if name.endswith("jpg") else "clip.mp4"), folder / "demo-out" / place / name)
    (folder / "train.jsonl").write_text(blocks("README.md", "jsonl")[0])
    config = json.loads(blocks("README.md", "json")[0])
    (folder / "full.json").write_text(json.dumps(config))
    config["recipe"]["steps"] = 2
    (folder / "run.json").write_text(json.dumps(config))
    return folder


def python_blocks():
    return [pytest.param(code, id=f"{page}-{i}") for page in PAGES for i, code in enumerate(blocks(page, "python"))]


@pytest.mark.parametrize("code", python_blocks())
def test_python_blocks_run(code, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    exec(compile(code, "README", "exec"), {"__name__": "readme"})
    out = capsys.readouterr().out.splitlines()
    promised = [found[1] for line in code.splitlines() if (found := re.match(r"print\(.*\)\s+# (\S+)$", line))]
    assert out[: len(promised)] == promised


def test_longvita_commands_run_in_their_order(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    lines = [line for page in PAGES for line in commands(page) if line.startswith("longvita ")]
    assert len(lines) >= 7
    for line in lines:
        argv = shlex.split(line)[1:]
        args = cli.build_parser(argv[0]).parse_args(argv)
        if args.command not in PARSED_ONLY:
            code = cli.main(argv)
            assert code == 0, f"{line}: {capsys.readouterr().err}"
    assert (folder / "loss.png").exists() and (folder / "runs" / "mine" / "config.json").exists()


def test_the_readmes_files_are_valid(folder, capsys):
    samples = list(read_jsonl(folder / "train.jsonl"))
    assert len(samples) == 3 and any(sample.videos for sample in samples)
    assert cli.main(["config", "check", str(folder / "full.json")]) == 0
    assert "ok: a model of" in capsys.readouterr().out


@pytest.mark.parametrize("line", sorted({line for page in PAGES for line in commands(page) if line.startswith("make ")}))
def test_make_targets_exist(line):
    # Not with what the make that runs these tests was given: ARGS are for pytest then.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "ARGS")}
    done = subprocess.run([*shlex.split(line), "-n"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if line.startswith("make bench"):
        (words,) = [shlex.split(command.split("-m bench")[1]) for command in done.stdout.splitlines() if "-m bench" in command]
        program = bench.PROGRAMS.get(words[0])
        assert program._arguments(words[1:]) if program else bench.select(bench._arguments(words))
    if "demo" in line:
        (words,) = [shlex.split(command)[1:] for command in done.stdout.splitlines() if "/longvita " in command]
        args = cli.build_parser("demo").parse_args(words)
        assert args.command == "demo" and args.quick == ("--quick" in line)


def test_other_commands_name_files_that_exist():
    others = [line for page in PAGES for line in commands(page) if not line.startswith(("longvita ", "make "))]
    for line in others:
        words = shlex.split(line)
        assert words[0] == ".venv/bin/python", f"no test knows how to check {line!r}"
        for word in words[1:]:
            assert not word.endswith(".py") or (ROOT / word).exists(), line


def test_the_op_table_and_its_examples_are_complete():
    table = re.findall(r"^\| `(\w+)` \|", PAGES["README.md"], re.MULTILINE)
    assert sorted(table) == sorted(longvita_kernels.__all__)
    examples = "\n".join(blocks("README.md", "python"))
    for op in longvita_kernels.__all__:
        assert re.search(rf"\b{op}\(", examples), f"the README has no example of {op}"


def test_local_links_and_pictures_exist():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (ROOT / target).exists(), f"{page} points to {target}"


def test_extras_and_options_that_are_named_exist():
    project = (ROOT / "pyproject.toml").read_text()
    section = re.search(r"^\[project\.optional-dependencies\]\n(.*?)^\[", project, re.MULTILINE | re.DOTALL)[1]
    extras = set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))
    text = "\n".join(PAGES.values())
    named = {part for found in re.findall(r"longvita\[([\w,]+)\]", text) for part in found.split(",")}
    assert named and named <= extras
    source = "\n".join(path.read_text() for package in ("longvita_kernels", "longvita") for path in (ROOT / package).rglob("*.py"))
    source += (ROOT / "setup.py").read_text()
    for variable in set(re.findall(r"LONGVITA_[A-Z]+", text)):
        assert variable in source, f"the documentation names {variable}, which nothing reads"


def test_pinned_versions_cover_what_is_installed():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert {"torch", "numpy", "tokenizers", "safetensors", "pillow", "av", "matplotlib", "scikit-learn", "pytest"} <= set(pins)


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    assert script.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in script
    assert {"make cuda-check", "make test", "make isa"} <= set(script.splitlines()) and "make test" in commands("README.md")


def test_the_demo_s_figures_are_filled_in():
    table = PAGES["README.md"].split("<!-- demo-figures")[1].split("\n\n")[1]
    rows = [line.split("|")[1:-1] for line in table.splitlines()[2:]]
    assert len(rows) >= 8 and all(re.search(r"\d", row[2]) for row in rows)
    assert "–" not in "".join(cell for row in rows for cell in row[1:])
