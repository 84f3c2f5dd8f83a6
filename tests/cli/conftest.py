"""What the command line's tests share: a run directory with a tiny model, and `longvita` called in this process."""

import io
import sys
from types import SimpleNamespace

import pytest
from tiny_run import make_run

from longvita.cli import main


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A demo's --out directory: the model lies in its last stage."""
    return make_run(tmp_path_factory.mktemp("demo-out") / "stage4").parent


@pytest.fixture
def longvita(capsys, monkeypatch):
    """longvita("config", "show", "tiny") → code, out, err; `stdin=` is what a pipe would bring."""

    def call(*words, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as exit:  # argparse
            code = exit.code
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err, "escape codes although the output is no terminal"
        return SimpleNamespace(code=code, out=out, err=err)

    return call
