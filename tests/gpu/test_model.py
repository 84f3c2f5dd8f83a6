"""The whole model on a GPU: kernels do not change training, and 32 steps learn. Run by bench/gpu.sh model."""

import dataclasses

import torch

from longvita import Batch, LongVita, presets
from longvita_kernels import backends


def _batch():
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(0, 400, (n,), generator=generator).tolist() for n in (50, 13, 30)]
    batch = Batch.from_ids(ids)
    rows = torch.stack([torch.arange(2, 18), torch.arange(22, 38), torch.arange(65, 81)])
    labels = torch.full((93,), -100)
    for start, end in ((40, 50), (50, 63), (85, 93)):
        labels[start:end] = batch.input_ids[start:end]
    images = torch.randn(3, 3, 32, 32, generator=generator)
    batch = dataclasses.replace(batch, images=images, image_indices=torch.stack([torch.zeros_like(rows), rows]), labels=labels)
    moved = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return dataclasses.replace(batch, **{n: x.cuda() for n, x in moved.items() if isinstance(x, torch.Tensor)})


def _losses(backend):
    with backends.use(backend):
        model, batch = LongVita(presets["tiny"]).init_weights(0, 0.1).cuda(), _batch()
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=1e-2), []
        for _ in range(32):
            loss, count = model.loss(batch)
            optimizer.zero_grad()
            (loss / count).backward()
            optimizer.step()
            losses.append(loss.item() / int(count))
    return torch.tensor(losses, dtype=torch.float64)


def test_kernels_do_not_change_training():
    """32 steps of everything in float32: the loss at every step, Triton against the references."""
    torch.set_float32_matmul_precision("highest")
    ours, reference = _losses("triton"), _losses("reference")
    assert ours[-1] < ours[0] - 0.1
    torch.testing.assert_close(ours, reference, rtol=2e-5, atol=0)
