"""The benchmark measures what it says, refuses what is wrong, and knows every op."""

import json
from dataclasses import replace

import pytest
import torch

from bench import __main__ as command
from bench import harness, host, machine, report, varlen_attention
from longvita_kernels import testing
from longvita_kernels.ops.varlen_attention import SPEC
from longvita_kernels.spec import SampleInput, all_specs


def _case(calls, check=list, **options):
    options = {"op": "varlen_attention", "flops": 1000, "bytes": 1000, "ceiling": "mm", **options}
    setup = harness.Setup(calls=calls, check=check)
    return harness.Case(label="made up", dtype=torch.float32, direction="forward", build=lambda: setup, **options)


@pytest.fixture
def sleep(monkeypatch):
    """A clock that only these calls move: a busy machine changes nothing."""
    now = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])

    def sleep(seconds):
        now[0] += seconds

    return sleep


def test_times_are_medians_of_interleaved_rounds(sleep):
    order, extra = [], iter([0.0, 0.0, 0.0, 5.0] + [0.0] * 100)

    def first():
        order.append("a")
        sleep(0.03)

    def second():
        order.append("b")
        sleep(0.04 + next(extra))

    seconds, rounds = harness.interleave({"a": first, "b": second}, seconds=0.72)
    assert rounds == 10 and order == ["a", "a", "b", "b"] + ["a", "b"] * rounds
    assert seconds == pytest.approx({"a": 0.03, "b": 0.04})


def test_a_short_call_is_repeated(sleep):
    calls = []
    seconds, rounds = harness.interleave({"a": lambda: calls.append(sleep(0.002))}, seconds=0.0)
    assert rounds == 3 and len(calls) == 2 + 3 * 10 and seconds["a"] == pytest.approx(0.002)


def test_share_and_ratios_come_from_one_run(sleep):
    case = _case({"longvita": lambda: sleep(0.03), "peer": lambda: sleep(0.06)}, flops=30)
    result = harness.measure(case, (lambda: sleep(0.02), 40), seconds=0.5)
    assert result.share == pytest.approx(0.5)  # 30 in 30 ms against 40 in 20 ms
    assert result.peers["peer"] == pytest.approx(2.0)


GOALS = {  # met, not met, of calls and figures that were not measured
    True: (
        harness.share(0.49), harness.share(0.3, "longvita, twice", work=2), harness.times_as_long("peer", least=2), harness.best_peer(2),
        harness.best_peer(3, besides=("peer",)), harness.seconds(0.04), harness.peak(100),
    ),
    False: (
        harness.share(0.51), harness.share(0.5, "longvita, twice", work=2), harness.times_as_long("peer", most=1.9),
        harness.best_peer(2.5), harness.best_peer(5, besides=("peer",)), harness.seconds(0.02), harness.peak(99),
    ),
    None: (harness.share(0.1, "other"), harness.times_as_long("other", least=1), harness.peak(1, "peer")),
}  # fmt: skip


@pytest.mark.parametrize(("met", "goal"), [(met, goal) for met, goals in GOALS.items() for goal in goals])
def test_goals(met, goal):
    seconds = {"longvita": 0.03, "longvita, twice": 0.09, "peer": 0.06, "slow peer": 0.12}
    result = harness.Result(
        case=_case({}, flops=30, goals=(goal,)), problems=[], seconds=seconds, ceiling_rate=2000.0, peak_bytes={"longvita": 100}
    )
    assert goal.met(result) is met
    words = {True: [": met"], False: [": NOT MET"], None: []}[met]
    assert [line[-len(word) :] for line, word in zip(report.goal_lines(result), words, strict=True)] == words
    assert report.as_dict(result)["goals"] == report.goal_lines(result)


def test_memory_is_weighed_when_all_times_are_taken(monkeypatch, capsys):
    events = []
    monkeypatch.setattr(machine, "measure_ceilings", lambda seconds, device: {"mm float32": 1e9})

    def measure(case, *args, **options):
        events.append("time")
        return harness.Result(case=case, problems=[], seconds={"longvita": 1.0})

    def weigh(result, device):
        events.append("weigh")
        return {"longvita": 1 << 20}

    monkeypatch.setattr(command, "measure", measure)
    monkeypatch.setattr(command, "weigh", weigh)
    assert command.main(["dispatch"]) == 0
    assert events == ["time"] * (len(events) // 2) + ["weigh"] * (len(events) // 2) and len(events) > 2
    assert "longvita 1.0 MiB" in capsys.readouterr().out


def test_a_wrong_op_gets_no_times():
    called = []
    case = _case({"longvita": lambda: called.append(1)}, check=lambda: ["out: off by 5 %"])
    result = harness.measure(case, (lambda: None, 1), seconds=0.1)
    assert not called and not result.seconds
    assert any("REFUSED: out: off by 5 %" in line for line in report.lines(result))
    assert "seconds" not in report.as_dict(result)


def _fails(*_):
    raise RuntimeError("no\n  kernel")


def test_a_peer_that_does_not_run_costs_the_op_nothing():
    result = harness.measure(_case({"longvita": lambda: None, "peer": _fails}), (lambda: None, 1), seconds=0.0)
    assert set(result.seconds) == {"longvita"} and result.failed == {"peer": "RuntimeError: no kernel"}
    assert report.as_dict(result)["failed"] == result.failed and "peer" in report.lines(result)[-1]
    with pytest.raises(RuntimeError):
        harness.measure(_case({"longvita": _fails}), (lambda: None, 1), seconds=0.0)


def test_a_case_that_fails_costs_the_others_nothing(tmp_path, capsys, monkeypatch):
    """And what is known is on disk before the next case begins."""
    path, seen = tmp_path / "out.json", []

    def second():
        seen.extend(json.loads(path.read_text())["results"])
        return harness.Setup(calls={"longvita": lambda: None}, check=list)

    monkeypatch.setattr(machine, "measure_ceilings", lambda seconds, device: {})
    cases = [replace(_case({}, ceiling=None), build=build) for build in (_fails, second)]
    arguments = command._arguments(["--seconds", "0", "--no-memory", "--json", str(path)])
    assert command._report(cases, arguments) == 1
    assert [result["problems"] for result in seen] == [["RuntimeError: no kernel"]] and "REFUSED: RuntimeError" in capsys.readouterr().out
    assert [bool(result["problems"]) for result in json.loads(path.read_text())["results"]] == [True, False]


def test_peak_memory_sees_what_a_call_held_for_a_moment():
    def holds(mebibytes):
        def call():
            held = torch.ones(mebibytes << 18)
            return held.sum()

        return call

    assert 30 << 20 < harness.peak_bytes(holds(32)) < 40 << 20
    assert harness.peak_bytes(lambda: None) < 4 << 20


@pytest.mark.parametrize("causal", [True, False])
def test_the_blockwise_definition_is_the_definition(causal):
    sample = next(s for s in SPEC.samples(torch.float32, "cpu", 0) if s.label.startswith("group of 4"))
    q, k, v, cu = sample.args[:4]
    sample = SampleInput("", (q, k, v, cu), {"causal": causal}, ("q", "k", "v"))
    run = testing.run(lambda *a, **kw: (SPEC.reference(*a, **kw), q[:, 0, 0]), SPEC, sample, used=("out",), double=True)
    grad = testing.cotangent(run.outputs["out"], 0)
    got = varlen_attention.in_blocks(q, k, v, cu, grad, causal, torch.float64, heads=(0, 1), block=8)
    for name, x, ref in zip(("out", "q", "k", "v"), got, (run.outputs["out"], *run.grads.values()), strict=True):
        torch.testing.assert_close(x, ref, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("backward", [False, True])
def test_attention_is_checked_on_the_tensors_that_are_timed(backward, monkeypatch):
    setup = varlen_attention._build((40, 25), (4, 2), 32, True, torch.float32, backward, pairs=1 << 30)
    assert setup.check() == []
    right = varlen_attention.varlen_attention
    monkeypatch.setattr(varlen_attention, "varlen_attention", lambda *args, **kwargs: right(*args, **kwargs) * 1.05)
    assert setup.check()


def test_peers_agree_with_the_op():
    lengths = (16, 16)
    setup = varlen_attention._build(lengths, (4, 2), 32, True, torch.float32, True, pairs=1)
    ours = setup.calls["longvita"]()
    for name, call in setup.calls.items():
        for ref, got in zip(ours, call(), strict=True):
            torch.testing.assert_close(got, ref, rtol=1e-4, atol=1e-5, msg=name)


def test_ceilings_count_their_work():
    call, flops = machine.register_peak(pairs=False)
    assert call() == flops >= 1_000_000 * 2 * torch.get_num_threads()
    call, size = machine.read()
    call()
    assert machine.READ_BYTES // 2 < size <= machine.READ_BYTES


def test_the_work_beside_the_ops_is_checked_before_it_is_timed():
    """Once each: the command line, a plan, a sample, and files that must be refused for the reason that is stated."""
    for case in host.cases():
        assert case.build().check() == [], case.name
        assert case.goals, case.name


def test_a_case_without_a_dtype_is_named_by_its_label():
    case = next(case for case in host.cases())
    assert case.name == "longvita --help" and report.as_dict(harness.Result(case=case, problems=["wrong"]))["dtype"] == ""


def test_every_op_has_cases_with_unique_names():
    cases = command.select(command._arguments(["--heavy"]))
    names = [(case.op, case.name) for case in cases]
    assert len(set(names)) == len(names)
    assert {case.op for case in cases} == set(all_specs()) | {"host"}


def test_a_small_run_ends_with_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(machine, "measure_ceilings", lambda seconds, device: {"mm float32": 1e9})
    arguments = ["dispatch", "--case", "tiny", "--seconds", "0", "--no-memory", "--no-peers", "--json", str(tmp_path / "out.json")]
    assert command.main(arguments) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == json.loads((tmp_path / "out.json").read_text())
    assert {result["op"] for result in last["results"]} == set(all_specs())
    assert all(set(result["seconds"]) == {"longvita"} for result in last["results"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["nonsense"], "expected one of varlen_attention"), (["--case", "nothing like it"], "no case fits"), (["--runs", "0"], "at least 1")],
)
def test_wrong_usage_is_one_line(arguments, words, capsys):
    assert command.main(arguments) == 2
    assert words in capsys.readouterr().err
