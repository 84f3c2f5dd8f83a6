"""Which parameter learns, at what rate, by which optimizer; gradient norm and the search for a bad one.

A part of the model or a ViT layer that matches no parameter is an error: a learning-rate rule that silently matches nothing trains a
different model.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from longvita.train.recipes import Recipe

_VISION_BLOCK = re.compile(r"\.encoder\.layers\.(\d+)\.")
_MATRIX = re.compile(r"\.layers\.\d+\.|\.vision_projection\.mlp\.")  # inside blocks; embeddings and head are matrices but no hidden ones

Parts = dict[str, dict[str, nn.Parameter]]  # part of the model → its parameters by full name


def vision_scale(name: str, recipe: Recipe, vision_layers: int) -> float:
    """Learning-rate multiplier of a ViT parameter: scale · decay^(layers + 1 − layer), embeddings layer 0, block i layer i + 1.

    The class token takes the scale without the decay.
    """
    if name.endswith("class_embedding"):
        return recipe.vision_lr_scale
    return recipe.vision_lr_scale * recipe.vision_layer_decay ** (vision_layers + 1 - _vision_layer(name))


def _vision_layer(name: str) -> int:
    if block := _VISION_BLOCK.search(name):
        return int(block.group(1)) + 1
    if ".embeddings." in name:
        return 0
    raise ValueError(f"no layer known for the vision parameter {name}: expected embeddings.* or encoder.layers.N.*")


def trained_parts(model: nn.Module, recipe: Recipe) -> Parts:
    """Freezes everything the recipe does not train and returns the rest. A part without parameters is an error."""
    model.set_trainable(recipe.trainable)
    parts = {part: model.part(part) for part in recipe.trainable}
    for part, named in parts.items():
        if not named:
            raise ValueError(f"the recipe trains {part!r}, but the model has no parameter there: remove {part!r} from Recipe.trainable")
    return parts


def parameter_groups(parts: Parts, recipe: Recipe, vision_layers: int) -> dict[str, list[dict]]:
    """Parameter groups for each optimizer: {"adamw": [...], "muon": [...]}, every group with `name`, `params`, `lr` and `peak_lr`.

    Under `optimizer="muon"` the two-dimensional weights inside ViT blocks, decoder layers and projector go to Muon at `muon_lr`;
    embeddings, head, norms, biases, LayerScale and the patch convolution stay with AdamW at `lr`. The ViT rule scales both.
    """
    if "vision" in parts:
        _check_vision_layers(parts["vision"], vision_layers)
    by_key: dict[tuple[str, str, float], list[nn.Parameter]] = defaultdict(list)
    for part, named in parts.items():
        for name, parameter in named.items():
            kind = "muon" if recipe.optimizer == "muon" and parameter.ndim == 2 and _MATRIX.search(name) else "adamw"
            scale = vision_scale(name, recipe, vision_layers) if part == "vision" else 1.0
            by_key[kind, part, scale].append(parameter)
    groups: dict[str, list[dict]] = defaultdict(list)
    for (kind, part, scale), params in by_key.items():
        peak = scale * (recipe.muon_lr if kind == "muon" else recipe.lr)
        groups[kind].append({"name": f"{part} × {scale:.6g}", "params": params, "lr": peak, "peak_lr": peak})
    if recipe.optimizer == "muon" and "muon" not in groups:
        raise ValueError("optimizer='muon', but no trained parameter is a matrix inside a block: use optimizer='adamw'")
    return dict(groups)


def _check_vision_layers(named: dict[str, nn.Parameter], vision_layers: int) -> None:
    matched = {_vision_layer(name) for name in named if not name.endswith("class_embedding")}
    expected = set(range(vision_layers + 1))
    if matched != expected:
        raise ValueError(
            f"the ViT's layer decay expects parameters in layers 0 (embeddings) … {vision_layers}; "
            f"without any: {sorted(expected - matched)}, beyond them: {sorted(matched - expected)}. "
            f"Does config.vision.num_layers = {vision_layers} describe this model?"
        )


def build_optimizers(parts: Parts, recipe: Recipe, vision_layers: int) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon beside it when the recipe asks for it. Parameters must be float32: they are the master weights."""
    for name, parameter in (item for named in parts.values() for item in named.items()):
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"expected float32 master weights, got {parameter.dtype} for {name}: call model.float(); "
                "Recipe(dtype='bfloat16') computes in bfloat16 over them"
            )
    groups = parameter_groups(parts, recipe, vision_layers)
    optimizers: list[torch.optim.Optimizer] = []
    if "adamw" in groups:
        optimizers.append(
            torch.optim.AdamW(
                groups["adamw"], lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay, fused=True
            )
        )
    if "muon" in groups:
        optimizers.append(BatchedMuon(groups["muon"], lr=recipe.muon_lr, weight_decay=recipe.weight_decay, momentum=recipe.muon_momentum))
    return optimizers


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Puts every group at `factor` of its peak rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


class BatchedMuon(torch.optim.Muon):
    """`torch.optim.Muon`, with all matrices of one shape orthogonalised in one batch, in float32 on a CPU.

    torch's own takes the matrices one by one in bfloat16, which on a CPU without bfloat16 instructions is 16 × slower than this
    (38 matrices of a tiny model, one AVX2 core: 640 ms against 40 ms a step).
    """

    @torch.no_grad()
    def step(self, closure=None):
        """One update; `closure`, if given, recomputes the loss first. Returns its loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[tuple(parameter.shape)].append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[nn.Parameter], group: dict) -> None:
        grads = [parameter.grad for parameter in parameters]
        buffers = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffers.append(state["momentum_buffer"])
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        update_NRC = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"]) if group["nesterov"] else buffers)
        update_NRC = orthogonalize(update_NRC, group["ns_coefficients"], group["ns_steps"], group["eps"])
        rows, columns = parameters[0].shape
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, list(update_NRC.unbind()), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonalize(x_NRC: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Newton–Schulz iteration towards the nearest semi-orthogonal matrix, for N matrices at once.

    Same polynomial as `torch.optim.Muon` (Keller Jordan's); float32 on a CPU, bfloat16 elsewhere.
    """
    a, b, c = coefficients
    tall = x_NRC.shape[-2] > x_NRC.shape[-1]
    x = (x_NRC.mT if tall else x_NRC).to(torch.float32 if x_NRC.device.type == "cpu" else torch.bfloat16)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(x_NRC.dtype)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Global 2-norm of all gradients, a float32 scalar tensor."""
    return torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters], foreach=True)


def first_non_finite(named: dict[str, nn.Parameter]) -> str | None:
    """Name of the first parameter, in model order, whose gradient holds an infinity or NaN."""
    for name, parameter in named.items():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return name
    return None
