"""The frame of the command line: quick and light help, exit codes, one message per error."""

import argparse
import importlib
import shlex
import subprocess
import sys
import types

import pytest

from longvita import cli
from longvita.cli import errors

WITHOUT_TORCH = """
import sys
from longvita.cli import main
try:
    code = main({argv!r})
except SystemExit as exit:
    code = exit.code
heavy = sorted({{"torch", "numpy", "matplotlib", "av", "transformers", "tokenizers", "PIL"}} & set(sys.modules))
assert not heavy, heavy
sys.exit(code)
"""
ONLY_STANDARD = """
import sys
before = set(sys.modules)  # an editable install has loaded its own finder
from longvita.cli import main
try:
    code = main(["--help"])
except SystemExit as exit:
    code = exit.code
names = {name.partition(".")[0] for name in set(sys.modules) - before}
installed = names - sys.stdlib_module_names - {"longvita"}
assert not installed, installed
sys.exit(code)
"""


def test_help_loads_the_standard_library_alone():
    """Which is what makes it quick; `python -m bench host --case help` measures the time."""
    done = subprocess.run([sys.executable, "-c", ONLY_STANDARD], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, command in cli.COMMANDS.items():
        assert f"    {name} " in done.stdout and command.help.split()[0] in done.stdout


@pytest.mark.parametrize(
    "line", ["--version", "demo --help", "train --help", "chat --help", "eval needle --help", "plot --help", "config show 14b"]
)
def test_light_commands_load_no_heavy_package(line):
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH.format(argv=line.split())], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


HELPS = [[name] for name in cli.COMMANDS] + [["config", "show"], ["config", "diff"], ["config", "check"], ["eval", "needle"]]


@pytest.mark.parametrize("words", HELPS, ids=" ".join)
def test_help_ends_with_a_command_that_parses(longvita, words):
    result = longvita(*words, "--help")
    assert result.code == 0
    example = result.out.rstrip().splitlines()[-1].strip()
    assert example.startswith(f"longvita {words[0]}")
    argv = shlex.split(example)[1:]
    args = cli.build_parser(argv[0]).parse_args(argv)
    assert args.command == words[0]


def test_no_command_prints_the_help(longvita):
    result = longvita()
    assert result.code == 0 and "longvita demo" in result.out


def test_version(longvita):
    assert longvita("--version").out.startswith("longvita ")


def test_wrong_usage_is_2(longvita):
    assert longvita("dmo").code == 2
    assert longvita("plot").code == 2
    assert longvita("chat", "--run", "x", "--no-such-flag").code == 2


@pytest.fixture
def command(monkeypatch, longvita):
    """Calls `longvita doctor` with another body."""

    def call(body, *words):
        module = types.SimpleNamespace(add_arguments=lambda parser: None, run=body)
        monkeypatch.setitem(sys.modules, "longvita.cli.doctor", module)
        return longvita("doctor", *words)

    return call


def raising(error):
    def body(args):
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (errors.UsageError("expected a run, got nothing"), 2, "expected a run, got nothing"),
        (ValueError("line 3: broken"), 2, "line 3: broken"),
        (FileNotFoundError(2, "No such file or directory", "a.json"), 2, "No such file or directory: a.json"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (RuntimeError("loss is not finite"), 1, "loss is not finite"),
        (MemoryError(), 1, "out of memory"),
        (KeyboardInterrupt("stopped after step 7; saved step-000007"), 130, "interrupted: stopped after step 7; saved step-000007"),
        (KeyboardInterrupt(), 130, "run the same command again"),
        (KeyError("x"), 1, "internal error, please report it: KeyError: 'x' (at test_cli_main.py"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_error_is_one_message_and_a_code(command, error, code, message):
    result = command(raising(error))
    assert result.code == code
    assert message in result.err and result.err.startswith("longvita doctor: ")
    assert len(result.err.splitlines()) == 1 and "Traceback" not in result.err
    assert result.out == ""


def test_debug_shows_the_traceback(command):
    result = command(raising(ValueError("line 3: broken")), "--debug")
    assert result.code == 2
    assert "Traceback" in result.err and result.err.rstrip().endswith("longvita doctor: line 3: broken")


def test_exit_code_of_the_command_is_passed_on(command):
    assert command(lambda args: None).code == 0
    assert command(lambda args: 1).code == 1


def test_a_missing_package_names_the_extra_that_brings_it(command, monkeypatch):
    requires = ["torch>=2.11", 'av>=12; extra == "video"', 'longvita[plot,video]; extra == "demo"', 'matplotlib; extra == "plot"',
                'scikit-learn; extra == "demo"', 'pytest; extra == "dev"', 'longvita[demo]; extra == "dev"']  # fmt: skip
    monkeypatch.setattr(errors.metadata, "requires", lambda name: requires)
    assert errors.extras() == {
        "video": {"av"}, "plot": {"matplotlib"}, "demo": {"av", "matplotlib", "scikit-learn"},
        "dev": {"av", "matplotlib", "scikit-learn", "pytest"},
    }  # fmt: skip
    for module, remedy in (("av", '"longvita[video]"'), ("sklearn.datasets", '"longvita[demo]"'), ("PIL", "pillow"), ("yaml", "pyyaml")):
        result = command(raising(ModuleNotFoundError(f"No module named {module!r}", name=module)))
        assert result.code == 1
        assert f"pip install {remedy}" in result.err


def test_a_missing_package_without_metadata(monkeypatch):
    def not_installed(name):
        raise errors.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(errors.metadata, "requires", not_installed)
    assert errors.extras() == {}
    assert "pip install matplotlib" in errors.missing_module("matplotlib.pyplot")
    assert "install longvita again" in errors.missing_module("longvita.cli.nothing")


def test_every_command_has_a_module_with_the_two_functions():
    for name in cli.COMMANDS:
        module = importlib.import_module(f"longvita.cli.{name}")
        module.add_arguments(argparse.ArgumentParser(add_help=False, conflict_handler="resolve"))
        assert callable(module.run)


def test_a_reader_that_leaves_gets_no_message():
    """`longvita config show 14b | head -1`"""
    script = f"{sys.executable} -m longvita.cli config show 14b --quiet | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stdout == "{\n" and done.stderr == ""
