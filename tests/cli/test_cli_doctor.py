"""`longvita doctor`: the report, and what it calls a problem."""

import json

import pytest

from longvita.cli import doctor

HEALTHY = {
    "torch": {"version": "2.13.0", "threads": 2, "gpus": []},
    "native": {"loaded": True, "isa": "avx2", "built_isas": {"portable": True, "avx2": True}, "isa_cap": None},
    "backend": {"requested": None, "wrong": None},
    "openmp_runtimes": ["/torch/lib/libgomp.so.1"],
    "disk_free_bytes": 10 * doctor.GIB,
    "memory_free_bytes": 10 * doctor.GIB,
}


def test_json_report_of_this_machine(longvita):
    result = longvita("doctor", "--json")
    report = json.loads(result.out)
    assert result.code == (1 if report["problems"] else 0)
    assert report["torch"]["threads"] >= 1 and report["cores"] >= 1
    assert report["native"]["loaded"] or report["native"]["missing"]
    assert report["memory_bytes"] > report["memory_free_bytes"] > 0
    assert 0 <= report["cores_taken"] <= report["cores"] and report["wait_policy"]


def test_lines_say_the_same(longvita):
    result = longvita("doctor")
    for word in ("python", "torch", "native core", "OpenMP", "memory", "disk"):
        assert any(line.startswith(word) for line in result.out.splitlines())
    assert ("No problems found." in result.out) == (result.code == 0)


def test_a_fixed_number_of_threads_is_told(longvita, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "threads (fixed by OMP_NUM_THREADS=3), GPUs" in longvita("doctor").out


def test_a_limit_on_cpu_time_is_told(longvita, monkeypatch):
    def machine_line(quota: float) -> str:
        monkeypatch.setattr(doctor.threads, "core_quota", lambda: quota)
        return next(line for line in longvita("doctor").out.splitlines() if line.startswith("machine"))

    assert "cores (CPU time limited to 0.5 by a control group)" in machine_line(0.5)
    assert "limited" not in machine_line(4096.0), "more than there is limits nothing"


def test_one_openmp_runtime_and_it_is_found():
    import torch

    torch.ones(4).sum()
    assert len([path for path in doctor.openmp_runtimes() if "/torch/" in path]) == 1


def test_a_healthy_machine_has_no_problems():
    assert doctor.problems(HEALTHY) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"torch": {"missing": "No module named 'torch'"}}, "No module named 'torch'. Install it with: pip install torch"),
        ({"native": {"loaded": False, "missing": "not built; run setup.py"}}, "every op runs its slow reference: not built; run setup.py"),
        ({"openmp_runtimes": ["/a/libgomp.so.1", "/b/libiomp5.so"]}, "2 OpenMP runtimes in one process fight for the cores"),
        ({"backend": {"requested": None, "wrong": "unknown backend 'x'"}}, "LONGVITA_BACKEND: unknown backend 'x'"),
        ({"disk_free_bytes": 10}, "of disk are free"),
        ({"memory_free_bytes": 10}, "of memory are free"),
    ],
)
def test_problems_and_their_remedies(change, message):
    (problem,) = doctor.problems({**HEALTHY, **change})
    assert message in problem


def test_a_missing_native_core_is_reported_and_exits_1(longvita, monkeypatch):
    from longvita_kernels import native

    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(native, "why_missing", lambda: "no compiler was found; install g++")
    monkeypatch.setattr(doctor, "openmp_runtimes", lambda: [])  # scikit-learn, if another test loaded it here, brings one of its own
    result = longvita("doctor")
    assert result.code == 1
    assert "NOT LOADED: no compiler was found; install g++" in result.out
    assert "1 problem(s) found." in result.out


def test_extras_say_what_is_missing(longvita, monkeypatch):
    monkeypatch.setattr(doctor, "_extras", lambda: {"serve": {"fastapi": None, "uvicorn": None}, "video": {"av": "18"}})
    out = longvita("doctor").out
    assert 'missing fastapi, uvicorn: pip install "longvita[serve]"' in out
    assert any(line.startswith("extra video") and line.endswith("installed") for line in out.splitlines())


@pytest.mark.parametrize(("taken", "warned"), [(None, False), (0.1, False), (1.02, True)])
def test_a_busy_machine_is_a_warning_and_not_a_problem(longvita, monkeypatch, taken, warned):
    monkeypatch.setattr(doctor.threads, "sample_cores_taken", lambda: taken)
    monkeypatch.setattr(doctor, "problems", lambda report: [])
    result = longvita("doctor")
    assert result.code == 0 and result.out.endswith("No problems found.\n")
    assert ("warning: other programs keep 1.0 of " in result.out) == warned
    report = json.loads(longvita("doctor", "--json").out)
    assert report["cores_taken"] == taken and len(report["warnings"]) == warned


def test_the_wait_policy_is_shown(longvita, monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "1234")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert "wait policy: GOMP_SPINCOUNT=1234\n" in longvita("doctor").out
    monkeypatch.delenv("GOMP_SPINCOUNT")
    assert json.loads(longvita("doctor", "--json").out)["wait_policy"] == "the OpenMP runtime's default"
