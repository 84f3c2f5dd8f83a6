"""The whole model: names, initialisation, image scatter, loss, freezing, recomputation, text alone."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from longvita import Batch, LongVita, presets

TINY = presets["tiny"]


def mixed_batch(labels=True):
    """Three samples: an image of two tiles, text alone, one more tile; answers supervised in each."""
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(0, 400, (n,), generator=generator).tolist() for n in (50, 13, 30)]
    batch = Batch.from_ids(ids)
    rows = torch.stack([torch.arange(2, 18), torch.arange(22, 38), torch.arange(65, 81)])
    images = torch.randn(3, 3, 32, 32, generator=generator)
    targets = torch.full((93,), -100)
    for start, end in ((40, 50), (50, 63), (85, 93)):  # the second sample is supervised from its first token on
        targets[start:end] = batch.input_ids[start:end]
    indices = torch.stack([torch.zeros_like(rows), rows])
    return dataclasses.replace(batch, images=images, image_indices=indices, labels=targets if labels else None)


def new_model(seed=0, std=0.1):
    return LongVita(TINY).init_weights(seed, std)


def gradients(model, batch):
    model.zero_grad(set_to_none=True)
    loss, count = model.loss(batch)
    loss.backward()
    return loss.item(), count, {name: p.grad for name, p in model.named_parameters()}


# ---- names and weights ----


def published_names(vision_layers, text_layers):
    names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for i in range(text_layers):
        layer = f"model.layers.{i}."
        names |= {layer + f"{n}.weight" for n in ("input_layernorm", "post_attention_layernorm", "self_attn.o_proj")}
        names |= {layer + f"self_attn.{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")}
        names |= {layer + f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
    vision = "model.vision_model."
    embeddings = ("class_embedding", "position_embedding", "patch_embedding.weight", "patch_embedding.bias")
    names |= {f"{vision}embeddings.{n}" for n in embeddings}
    for i in range(vision_layers):
        layer = f"{vision}encoder.layers.{i}."
        names |= {layer + "ls1", layer + "ls2"}
        both = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        names |= {f"{layer}{n}.{kind}" for n in both for kind in ("weight", "bias")}
    projection = "model.vision_projection."
    return names | {projection + n for n in ("pre_proj_layernorm.weight", "pre_proj_layernorm.bias", "mlp.0.weight", "mlp.2.weight")}


def test_meta_model_has_the_published_names_and_shapes():
    model = LongVita(presets["14b"], device="meta", dtype=torch.bfloat16)
    state = model.state_dict()
    assert state.keys() == published_names(24, 48)
    assert sum(p.numel() for p in model.parameters()) == 15_083_491_328 == model.config.num_params()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and {p.device.type for p in model.parameters()} == {"meta"}
    shapes = {name: tuple(state[name].shape) for name in state}
    assert shapes["model.vision_model.embeddings.position_embedding"] == (1, 1025, 1024)
    assert shapes["model.vision_model.embeddings.patch_embedding.weight"] == (1024, 3, 14, 14)
    assert shapes["model.vision_model.encoder.layers.23.attn.qkv.weight"] == (3072, 1024)
    assert shapes["model.vision_projection.mlp.0.weight"] == (1024, 4096) and shapes["model.vision_projection.mlp.2.weight"] == (5120, 1024)
    assert shapes["model.layers.47.self_attn.k_proj.weight"] == (1024, 5120)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (5120, 13824)
    assert shapes["lm_head.weight"] == (152064, 5120)


def test_initialisation_follows_the_seed():
    first, again, other = new_model(7), new_model(7), new_model(8)
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        if a.dim() > 1:
            assert not torch.equal(a, c) and abs(a.std().item() / 0.1 - 1) < 0.2
        else:
            assert (a == (0.0 if name.endswith("bias") else 1.0)).all()


def test_tied_embeddings_have_one_matrix():
    config = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, tie_word_embeddings=True))
    model = LongVita(config).init_weights(0, 0.1)
    assert "lm_head.weight" not in model.state_dict() and model.head_weight is model.model.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) == config.num_params() == TINY.num_params() - 512 * 128
    loss, _ = model.loss(mixed_batch())
    loss.backward()
    assert model.head_weight.grad.abs().sum(1).min() > 0  # as a head, every row is pushed


def test_parts_cover_the_model_once():
    model = LongVita(TINY, device="meta")
    names = [name for part in (model.vision, model.projector, model.text) for name in part]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="unknown part of the model 'vit'; parts are vision, projector, text"):
        model.set_trainable(["vit"])
    with pytest.raises(ValueError, match="must be a LongVitaConfig, got str"):
        LongVita("14b")


# ---- images ----


@torch.no_grad()
def test_features_replace_exactly_their_rows():
    model, batch = new_model(), mixed_batch()
    embedded = model.embed(batch)
    features = model.encode_images(batch.images)
    assert features.shape == (3, 16, 128)
    for tile, rows in zip(features, batch.image_indices[1], strict=True):
        assert torch.equal(embedded[rows], tile)
    text = torch.ones(93, dtype=torch.bool).index_fill(0, batch.image_indices[1].flatten(), False)
    assert torch.equal(embedded[text], model.model.embed_tokens(batch.input_ids)[text])
    torch.testing.assert_close(model.encode_images(batch.images, tiles_at_once=2), features, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_order_of_tiles_follows_their_indices():
    model, batch = new_model(), mixed_batch()
    order = torch.tensor([2, 0, 1])
    shuffled = dataclasses.replace(batch, images=batch.images[order], image_indices=batch.image_indices[:, order])
    torch.testing.assert_close(model(shuffled), model(batch), rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_part_and_no_placeholder():
    model, batch = new_model(), mixed_batch()
    placeholder = 500
    batch = dataclasses.replace(batch, input_ids=batch.input_ids.index_fill(0, batch.image_indices[1].flatten(), placeholder))
    _, _, grads = gradients(model, batch)
    assert all(g is not None and g.abs().sum() > 0 for name, g in grads.items() if not name.endswith("k_proj.bias"))
    assert not grads["model.embed_tokens.weight"][placeholder].any()


def test_text_alone_trains():
    model = new_model()
    ids = [[3, 4, 5, 6], [7, 8]]
    batch = Batch.from_ids(ids)
    loss, count, grads = gradients(model, dataclasses.replace(batch, labels=batch.input_ids.clone()))
    assert count == 4 and loss > 0
    assert all((grad is None) == (".vision_" in name) for name, grad in grads.items())


def test_no_tiles_is_text_alone():
    model, batch = new_model(), Batch.from_ids([[3, 4, 5]])
    none = dataclasses.replace(batch, images=torch.zeros(0, 3, 32, 32), image_indices=torch.zeros(2, 0, 16, dtype=torch.int64))
    assert torch.equal(model(none), model(batch))


# ---- loss ----


def test_loss_is_cross_entropy_of_the_next_token_in_the_sample():
    model, batch = new_model(), mixed_batch()
    loss, count = model.loss(batch)
    logits = model.logits(batch, rows=torch.ones(93, dtype=torch.bool))
    expected = 0.0
    # Token 50 is supervised but opens a sample: nothing predicts it.
    rows = [row for start, end in ((40, 50), (51, 63), (85, 93)) for row in range(start - 1, end - 1)]
    for row in rows:
        expected = expected + F.cross_entropy(logits[row], batch.input_ids[row + 1])
    assert count == len(rows) == 30 and loss.dtype == torch.float32 and loss.dim() == 0
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)


def test_packed_loss_is_the_sum_of_separate_losses():
    model = new_model()
    texts = [[3, 9, 4, 5, 6, 7], [7, 8, 1], [11, 12, 13, 14]]
    batches = [dataclasses.replace(b, labels=b.input_ids.clone()) for b in (Batch.from_ids([t]) for t in texts)]
    packed, count = model.loss(Batch.join(batches))
    separate = [model.loss(batch) for batch in batches]
    assert count == sum(n for _, n in separate) == 10
    torch.testing.assert_close(packed, sum(loss for loss, _ in separate), rtol=1e-6, atol=1e-6)


def test_nothing_supervised_gives_zero():
    model, batch = new_model(), mixed_batch()
    loss, count, grads = gradients(model, dataclasses.replace(batch, labels=torch.full_like(batch.labels, -100)))
    assert loss == 0.0 and count == 0
    assert all(grad is None or not grad.any() for grad in grads.values())


def test_bad_batches_are_refused():
    model = new_model()
    with pytest.raises(ValueError, match="input_ids must lie in 0 … 511, got 600"):
        model(Batch.from_ids([[1, 600]]))
    with pytest.raises(ValueError, match="no labels"):
        model.loss(Batch.from_ids([[1, 2]]))


# ---- freezing and recomputation ----


def test_frozen_vision_builds_no_graph():
    model, batch = new_model(), mixed_batch()
    model.set_trainable({"projector"})
    model.model.vision_projection.register_forward_pre_hook(lambda module, args: seen.append(args[0].requires_grad))
    seen = []
    _, _, grads = gradients(model, batch)
    assert seen == [False]
    assert {name for name, grad in grads.items() if grad is not None} == set(model.projector)
    model.set_trainable({"vision", "projector", "text"})
    _, _, grads = gradients(model, batch)
    assert seen == [False, True] and all(grad is not None for grad in grads.values())


def test_everything_frozen_gives_a_loss_without_a_graph():
    model = new_model()
    model.set_trainable(())
    loss, count = model.loss(mixed_batch())
    assert not loss.requires_grad and count == 30


@pytest.mark.parametrize("parts", [{"vision"}, {"projector"}, {"text"}, {"vision", "projector", "text"}])
def test_recomputation_changes_nothing_but_memory(parts):
    model, batch = new_model(), mixed_batch()
    loss, _, expected = gradients(model, batch)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        model.loss(batch)
    plain = sum(saved)
    saved.clear()
    model.set_recompute(parts)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        model.loss(batch)
    assert sum(saved) < plain
    recomputed, _, grads = gradients(model, batch)
    assert recomputed == loss
    for name, grad in grads.items():
        assert torch.equal(grad, expected[name]), name


def test_bf16_follows_fp32():
    model, batch = new_model(), mixed_batch()
    loss, count = model.loss(batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = model.loss(batch)
    whole, _ = LongVita(TINY, dtype=torch.bfloat16).init_weights(0, 0.1).loss(batch)
    assert mixed.dtype == whole.dtype == torch.float32
    assert abs(mixed.item() - loss.item()) / count < 0.02 and abs(whole.item() - loss.item()) / count < 0.05
