"""A DataLoader may fork after the first call."""

import os
import subprocess
import sys
from pathlib import Path

_FORKS = """
import os, signal, torch
from longvita_kernels import native, testing, varlen_attention

x, cu = torch.randn(300, 4, 64), torch.tensor([0, 300], dtype=torch.int32)  # enough work for a second thread
torch.set_num_threads(2)
expected = varlen_attention(x, x, x, cu)
assert native.load() is not None
pid = os.fork()
if pid == 0:
    signal.alarm(300)  # ends a child that hangs
    code = 1
    try:
        torch.set_num_threads(1)
        testing.assert_bit_equal(varlen_attention(x, x, x, cu), expected)
        code = 0
    finally:
        os._exit(code)
assert os.waitpid(pid, 0)[1] == 0, "the child failed, or hung for five minutes"
testing.assert_bit_equal(varlen_attention(x, x, x, cu), expected)  # and the parent goes on
"""


def test_a_child_with_one_thread_works_after_calls_with_two():
    """What a DataLoader's worker is. With two threads it would hang, as it would in torch's own ops: libgomp's do not survive a fork."""
    done = subprocess.run(
        [sys.executable, "-c", _FORKS], cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
