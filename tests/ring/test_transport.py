"""What a transfer that fails says, on a group like NCCL's whose wait returns at once and whose operations go under one work."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from longvita_kernels import plan_context_parallel, ring_attention, testing, varlen_attention
from longvita_kernels.ring import transport


class Work:
    """Complete after so many looks; `error`: not with success; `says`: its wait raises that, like gloo's."""

    def __init__(self, looks=0, error=None, says=None):
        self.looks, self.error, self.says, self.waited = looks, error, says, 0

    def is_completed(self):
        self.looks -= 1
        return self.looks < 0

    def exception(self):
        return self.error

    def wait(self):
        self.waited += 1
        if self.says is not None:
            raise RuntimeError(self.says)


@pytest.fixture
def clock(monkeypatch):
    """[seconds]: a clock that only the transport's naps move, so that a busy machine changes nothing."""
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(transport, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    return now


@pytest.fixture
def group(monkeypatch):
    """group(works, name of the backend): rank 1 of 4; its operations are `works`."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda group: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 4)
    monkeypatch.setattr(dist, "P2POp", lambda *arguments, **options: (arguments, options))

    def make(works, name="nccl"):
        backend = SimpleNamespace(name=lambda: name, options=SimpleNamespace(_timeout=timedelta(seconds=0.2)))
        monkeypatch.setattr(dist, "batch_isend_irecv", lambda operations: works)
        return transport.ProcessGroup(SimpleNamespace(_get_backend=lambda device: backend))

    return make


def _begin(group):
    x = torch.zeros(3)
    return group.exchange("forward, keys of step 2", [(0, x)], [(2, x), (3, x)])


def test_a_transfer_that_comes_through_orders_the_stream(group, clock):
    work = Work(looks=3)
    transfers = _begin(group([work]))
    transfers.wait()
    assert work.looks < 0 and work.waited == 1
    transfers.finish()
    assert work.waited == 1


def test_a_peer_that_hangs_is_named_before_the_watchdog_wakes(group, clock):
    work = Work(looks=1 << 60)
    with pytest.raises(
        RuntimeError,
        match="rank 1 of 4, forward, keys of step 2: receiving from rank 2, receiving from rank 3, sending to rank 0 failed; a peer has "
        "died, hangs, or called something else: nothing has come through within 90% of the group's time-out",
    ):
        _begin(group([work])).wait()
    assert clock[0] == pytest.approx(0.9 * 0.2, abs=1e-3) and work.waited == 0


def test_a_peer_that_died_is_named_with_what_the_library_says(group, clock):
    died = Work(looks=2, error=RuntimeError("NCCL communicator was aborted: remote process exited"))
    with pytest.raises(RuntimeError, match="keys of step 2: receiving from rank 2.* failed; .*: NCCL communicator was aborted: remote"):
        _begin(group([died])).finish()


def test_a_captured_graph_is_not_waited_for(group, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    work = Work(looks=1 << 60)
    _begin(group([work])).finish()
    assert work.waited == 1


def test_gloo_waits_by_itself_and_names_the_one_that_failed(group):
    works = [Work(looks=1 << 60), Work(says="Connection closed by peer"), Work(looks=1 << 60)]
    transfers = _begin(group(works, "gloo"))
    with pytest.raises(RuntimeError, match="rank 1 of 4, forward, keys of step 2: receiving from rank 3 failed; .*: Connection closed"):
        transfers.wait()
    assert [work.waited for work in works] == [1, 1, 0]


@pytest.mark.parametrize("backend", [None, "cpu:gloo", "gloo"])
def test_a_real_group_however_its_backend_was_named(backend):
    """Without a name torch calls it "undefined" and takes one for each kind of device. gloo keeps its time-out where NCCL does."""
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=7))
    try:
        group = transport.of(None, torch.device("cpu"))
        assert group.eager and group.deadline() is None
        assert transport._time_out(transport._backend(dist.group.WORLD, torch.device("cpu"))) == 7
        plan, q = plan_context_parallel([0, 5], 1), torch.randn(5, 1, 32)
        testing.assert_bit_equal(ring_attention(q, q, q, plan), varlen_attention(q, q, q, torch.tensor([0, 5], dtype=torch.int32)))
        assert plan.unshard(q).equal(q)
        with pytest.raises(ValueError, match="the group has no backend for tensors on xpu.*cpu:gloo,cuda:nccl"):
            transport.of(None, torch.device("xpu"))
    finally:
        dist.destroy_process_group()
