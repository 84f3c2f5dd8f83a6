"""The benchmark of a busy machine: its steps train, its ratios are taken within a round, and it ends with JSON. No time is asserted."""

import io
import json

import pytest
import torch

from bench import __main__ as command
from bench import busy
from longvita.threads import SPIN_COUNT


def sample(rate, threads=2, taken=0.0):
    return {"rate": rate, "threads": threads, "cores_taken": taken}


# The machine is twice as fast in the second round: ratios must not notice.
SAMPLES = {
    "before": {"alone": [sample(100.0), sample(200.0)], "busy": [sample(10.0), sample(20.0)]},
    "short spin": {"alone": [sample(99.0), sample(198.0)], "busy": [sample(40.0), sample(80.0)]},
    "longvita": {"alone": [sample(98.0), sample(196.0)], "busy": [sample(49.0, 1), sample(98.0, 1)]},
}


def test_ratios_are_taken_within_a_round_and_compared_with_goals():
    result = busy.result_of("small step", SAMPLES)
    ours = result["policies"]["longvita"]
    assert ours["left"] == pytest.approx(0.5) and ours["alone_to_before"] == pytest.approx(0.98)
    assert ours["busy_to_before"] == pytest.approx(4.9) and ours["threads_busy"] == 1
    assert [goal["met"] for goal in result["goals"]] == [True, True]
    lines = busy.lines_of(result)
    assert any("busy ÷ alone: 0.50, goal at least 0.4: met" in line for line in lines) and "repeat" not in lines[-1]


def test_a_missed_goal_and_a_machine_that_was_not_idle_are_said():
    slow = {**SAMPLES, "longvita": {"alone": [sample(90.0, taken=0.8)] * 2, "busy": [sample(30.0, 1)] * 2}}
    result = busy.result_of("8K step", slow)
    text = "\n".join(busy.lines_of(result))
    assert result["cores_taken_alone"] == 0.8 and text.count("NOT MET") == 2
    assert "other programs kept up to 0.8 cores busy while it ran alone" in text


def test_policies():
    found = busy.policies()
    assert found["before"] == busy.Policy(spin=None, adapt=False)
    assert found["longvita"] == busy.Policy(spin=SPIN_COUNT, adapt=True)


@pytest.mark.parametrize("adapt", [False, True])
def test_a_process_trains_and_answers(monkeypatch, capsys, adapt):
    monkeypatch.setitem(busy.WORKLOADS, "small step", busy.Workload(documents=2, length=16, seconds=0.0))
    monkeypatch.setattr(busy, "SETTLE_SECONDS", 0.0)
    threads = torch.get_num_threads()
    busy.serve(io.StringIO(json.dumps({"workload": "small step", "adapt": adapt}) + "\n"))
    answer = json.loads(capsys.readouterr().out)
    assert answer["rate"] > 0 and answer["threads"] >= 1 and torch.get_num_threads() == threads


def test_the_command_measures_every_policy_and_ends_with_json(monkeypatch, capsys, tmp_path):
    order = []

    class Worker:
        def __init__(self, policy):
            self.policy = policy

        def sample(self, workload):
            order.append((workload, self.policy))
            return sample(100.0)

        def close(self):
            order.append("closed")

    monkeypatch.setattr(busy, "Worker", Worker)
    assert command.main(["busy", "--rounds", "2", "--workload", "8K step", "--json", str(tmp_path / "busy.json")]) == 0
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert out == json.loads((tmp_path / "busy.json").read_text())
    assert [result["workload"] for result in out["results"]] == ["8K step"] and out["rounds"] == 2
    assert order[:12] == [("8K step", policy) for policy in busy.policies().values()] * 4 and order[12:] == ["closed"] * 3


def test_the_busy_process_ends(monkeypatch):
    started = []
    popen = busy.subprocess.Popen
    monkeypatch.setattr(busy.subprocess, "Popen", lambda *args, **options: started.append(popen(*args, **options)) or started[-1])
    with busy.busy_core():
        assert started[0].poll() is None
    assert started[0].returncode is not None
