"""python -m tests.cuda.peers FOLDER COUNT cpu|cuda

So many processes, ring attention over PeerCopies: on a GPU that they share, or on CPU tensors where LONGVITA_CUDA_EMULATED names a library
whose copies read the other process's memory. Each checks its own part against one process; the last case sends a tensor of another size.
"""

import datetime
import itertools
import os
import sys
import traceback

import torch
import torch.distributed as dist

from longvita_kernels import plan_context_parallel, ring_attention
from longvita_kernels.ring.peer_copies import PeerCopies
from tests.ring.support import on_one, shards, tensors, with_gradients

CASES = {
    "one document": {"lengths": [613]},
    "documents, some empty": {"lengths": [0, 1, 187, 1, 0, 3, 251, 0, 7, 1]},
    "all to all": {"lengths": [200, 3, 77], "mode": "all_to_all", "heads": (12, 6)},
}


def compare(group, device, lengths, heads=(4, 2), mode="ring"):
    """This rank's out, lse and gradients against those of one process, computed on the CPU."""
    plan = plan_context_parallel([0, *itertools.accumulate(lengths)], group.size)
    inputs = tensors(plan.total_tokens, heads, 32)
    mine = [x.to(device) for x in shards(plan, inputs, group.rank)]

    def ring(q, k, v):
        return ring_attention(q, k, v, plan, group=group, return_lse=True, mode=mode)

    for _ in range(2):  # events and opened memory are used again
        got = with_gradients(ring, mine[:3], mine[3:])
    want = on_one(plan, inputs)
    want = [plan.shard(x, group.rank, dim=1 if i == 1 else 0) for i, x in enumerate(want)]
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def disagree(group, device):
    """Rank 0 sends more than rank 1 expects: both say so, and nobody hangs."""
    if group.rank > 1:
        return
    tensor = torch.zeros(4 + group.rank, device=device)
    moving = group.exchange("a test", [(1, tensor)], []) if group.rank == 0 else group.exchange("a test", [], [(0, tensor)])
    try:
        moving.finish()
    except RuntimeError as error:
        said = ("it could not copy the tensor", "it sends 16 bytes, expected were 20")[group.rank]
        assert said in str(error) and f"rank {group.rank} of {group.size}, a test" in str(error), error
    else:
        raise AssertionError("nothing was said")


def work(folder, rank, count, device):
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count, timeout=datetime.timedelta(seconds=300)
    )
    group = PeerCopies()
    for name, case in CASES.items():
        if case.get("mode") == "all_to_all" and 6 % count:
            continue
        try:
            compare(group, device, **case)
        except Exception as error:
            raise AssertionError(f"{name}, rank {rank} of {count}: {error}") from error
    assert len(group._made) < 12 * count, "events are made anew instead of used again"
    disagree(group, device)
    dist.barrier()
    group.close()


def main(folder, count, device):
    children = []
    for rank in range(int(count)):
        if (child := os.fork()) == 0:
            code = 1
            try:
                work(folder, rank, int(count), device)
                code = 0
            except BaseException:  # a child must not go on as its parent
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(f"exit codes {codes}" if any(codes) else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
