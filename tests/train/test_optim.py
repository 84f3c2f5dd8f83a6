"""Parameter groups and their rates, freezing, Muon against torch's own, the gradient helpers."""

import pytest
import torch
from torch import nn

from longvita.model.long_vita import LongVita
from longvita.train import optim
from longvita.train.recipes import stage2
from tests.train.support import CONFIG, make_model, recipe


def groups_of(recipe_, model=None, layers=CONFIG.vision.num_layers):
    model = make_model() if model is None else model
    groups = optim.parameter_groups(optim.trained_parts(model, recipe_), recipe_, layers)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {kind: [(g["peak_lr"], {names[id(p)] for p in g["params"]}) for g in members] for kind, members in groups.items()}


def test_published_layer_decay_on_24_layers():
    """lr · 0.1 · 0.9^(25 − layer): embeddings layer 0, block i layer i + 1, class token without the decay."""
    published = stage2()
    rate = {
        name: published.lr * optim.vision_scale(f"model.vision_model.{name}", published, 24)
        for name in ("embeddings.class_embedding", "embeddings.position_embedding", "embeddings.patch_embedding.bias")
    } | {i: published.lr * optim.vision_scale(f"model.vision_model.encoder.layers.{i}.ls1", published, 24) for i in range(24)}
    assert rate["embeddings.class_embedding"] == pytest.approx(1e-6)
    assert rate["embeddings.position_embedding"] == rate["embeddings.patch_embedding.bias"] == pytest.approx(1e-6 * 0.9**25)
    assert rate[0] == pytest.approx(1e-6 * 0.9**24) and rate[23] == pytest.approx(1e-6 * 0.9)
    assert [rate[i + 1] / rate[i] for i in range(23)] == pytest.approx([1 / 0.9] * 23)


def test_every_trained_parameter_is_in_one_group():
    model = make_model()
    for trainable in (("projector",), ("projector", "text"), ("vision", "projector", "text")):
        for optimizer in ("adamw", "muon"):
            groups = groups_of(recipe(trainable=trainable, optimizer=optimizer), model)
            listed = [name for members in groups.values() for _, names in members for name in names]
            expected = [name for part in trainable for name in model.part(part)]
            assert sorted(listed) == sorted(expected)
            assert sorted(name for name, p in model.named_parameters() if p.requires_grad) == sorted(expected)


def test_group_rates_of_a_small_vision_tower():
    rates = {name: lr for lr, names in groups_of(recipe(lr=1.0, min_lr=0.0))["adamw"] for name in names}
    vision = "model.vision_model."
    assert rates["lm_head.weight"] == rates["model.vision_projection.mlp.0.weight"] == rates["model.layers.1.mlp.up_proj.weight"] == 1.0
    assert rates[vision + "embeddings.class_embedding"] == pytest.approx(0.1)
    assert rates[vision + "embeddings.position_embedding"] == pytest.approx(0.1 * 0.9**3)
    assert rates[vision + "encoder.layers.0.norm1.weight"] == pytest.approx(0.1 * 0.9**2)
    assert rates[vision + "encoder.layers.1.mlp.fc2.bias"] == pytest.approx(0.1 * 0.9)


def test_muon_takes_the_matrices_inside_blocks_and_nothing_else():
    groups = groups_of(recipe(optimizer="muon", muon_lr=0.5, lr=1.0, min_lr=0.0))
    muon = {name: lr for lr, names in groups["muon"] for name in names}
    adamw = {name for _, names in groups["adamw"] for name in names}
    assert muon["model.layers.0.self_attn.q_proj.weight"] == muon["model.vision_projection.mlp.2.weight"] == 0.5
    assert muon["model.vision_model.encoder.layers.1.attn.qkv.weight"] == pytest.approx(0.5 * 0.1 * 0.9)
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"):
        assert name in adamw
    assert "model.vision_model.embeddings.patch_embedding.weight" in adamw and "model.vision_model.encoder.layers.0.ls1" in adamw
    assert len(muon) == 2 * 7 + 2 * 4 + 2


def test_set_lr_scales_every_group():
    parts = optim.trained_parts(make_model(), recipe(optimizer="muon"))
    optimizers = optim.build_optimizers(parts, recipe(optimizer="muon"), 2)
    assert [type(o).__name__ for o in optimizers] == ["AdamW", "BatchedMuon"]
    peaks = [group["peak_lr"] for o in optimizers for group in o.param_groups]
    optim.set_lr(optimizers, 0.25)
    assert [group["lr"] for o in optimizers for group in o.param_groups] == [0.25 * peak for peak in peaks]
    optim.set_lr(optimizers, 1.0)
    assert [group["lr"] for o in optimizers for group in o.param_groups] == peaks
    assert optimizers[0].defaults["betas"] == (0.9, 0.999) and optimizers[0].defaults["weight_decay"] == 0


def test_a_rule_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"layers 0 \(embeddings\) … 3; without any: \[3\]"):
        groups_of(recipe(), layers=3)
    with pytest.raises(ValueError, match=r"beyond them: \[2\]"):
        groups_of(recipe(), layers=1)
    with pytest.raises(ValueError, match="no layer known for the vision parameter model.vision_model.neck.weight"):
        optim.vision_scale("model.vision_model.neck.weight", recipe(), 2)

    class Blind(LongVita):
        def part(self, name):
            return {} if name == "projector" else super().part(name)

    with pytest.raises(ValueError, match="the recipe trains 'projector', but the model has no parameter there"):
        optim.trained_parts(Blind(CONFIG).init_weights(0), recipe())
    head = {"text": {"lm_head.weight": nn.Parameter(torch.zeros(4, 4))}}
    with pytest.raises(ValueError, match="no trained parameter is a matrix inside a block: use optimizer='adamw'"):
        optim.parameter_groups(head, recipe(trainable="text", optimizer="muon"), 2)


def test_weights_must_be_float32():
    model = make_model().to(torch.bfloat16)
    with pytest.raises(ValueError, match="expected float32 master weights, got torch.bfloat16 for .*: call model.float"):
        optim.build_optimizers(optim.trained_parts(model, recipe()), recipe(), 2)


@pytest.mark.parametrize("nesterov", [True, False])
def test_batched_muon_is_torchs_muon(nesterov):
    """Three steps against torch.optim.Muon, whose orthogonalisation runs in bfloat16: that rounding is all that may differ."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 16), (16, 8), (8, 16), (12, 12)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    options = {"lr": 0.1, "weight_decay": 0.01, "nesterov": nesterov}
    a, b = optim.BatchedMuon(ours, **options), torch.optim.Muon(theirs, **options)
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q, w in zip(ours, theirs, start, strict=True):
        assert torch.linalg.norm(p - q) <= 0.02 * torch.linalg.norm(q - w)
    assert a.state[ours[0]].keys() == b.state[theirs[0]].keys()


def test_batched_muon_leaves_parameters_without_gradient_alone():
    parameters = [nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    parameters[0].grad = torch.eye(4)
    optimizer = optim.BatchedMuon(parameters, lr=0.1, weight_decay=0.0)
    assert optimizer.step(lambda: torch.tensor(7.0)) == 7
    assert torch.equal(parameters[1], torch.ones(4, 4)) and not torch.equal(parameters[0], torch.ones(4, 4))


def test_orthogonalize_brings_singular_values_near_one():
    matrices = torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(optim.orthogonalize(matrices, (3.4445, -4.775, 2.0315), 5, 1e-7))
    assert values.min() > 0.5 and values.max() < 1.5
    assert torch.equal(optim.orthogonalize(torch.zeros(1, 4, 4), (3.4445, -4.775, 2.0315), 5, 1e-7), torch.zeros(1, 4, 4))


def test_gradient_helpers():
    named = {"a": nn.Parameter(torch.zeros(3)), "b": nn.Parameter(torch.zeros(2)), "c": nn.Parameter(torch.zeros(1))}
    named["a"].grad, named["b"].grad = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([0.0, 4.0])
    assert optim.gradient_norm(p for p in named.values() if p.grad is not None) == 5
    assert optim.first_non_finite(named) is None
    named["b"].grad[0] = float("inf")
    named["c"].grad = torch.tensor([float("nan")])
    assert optim.first_non_finite(named) == "b"
