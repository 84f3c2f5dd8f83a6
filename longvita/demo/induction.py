"""Initial weights of a decoder that can recall: the attention heads it needs are constructed; all weights remain trainable.

How a transformer recalls is known as induction: one head copies the previous token, and a later head finds the tokens that followed earlier
copies of the current one. A small model takes minutes to discover this, and sometimes fails. So these heads are constructed here, as in
mimetic initialisation (Trockman and Kolter, 2023):

  layer 0, group 0   attends to the previous token and copies it
  layer 0, group 1   attends from the answer to the name in the question ("Which code starts with Oslo?"), a fixed distance back, and so
                     tells which code is asked for. Without it, training learned to find the digit after some name, but rarely after the
                     right one
  layer 1, group 0   attends to the tokens that follow an earlier copy of the current one

The heads of layer 0 attend a fixed distance back because q and k have a bias and almost nothing else: with k = c and q = c turned back by d
positions, RoPE's score peaks at distance d. Their values (a projection of the token) are written along directions of their own. The
matching head then compares the current token with what the first head wrote at every earlier one. It does so in RoPE's slow half, whose
angles hardly change over a thousand positions: at first a match stands out from as far as that. Jumps in the position ids teach the rest.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from longvita.data.schema import Sample
from longvita.eval.haystack import NAMES, TEXT_ANSWER, TEXT_QUESTION
from longvita.model.long_vita import LongVita

STRENGTH = 6.0  # c: the score of distance d exceeds that of d ± 1 by about 0.6 c² / sqrt(head size)
MATCH = 3.0  # q and k of the matching head
QUIET = 0.1  # what a head that looks at distances keeps of its random weights; the matching head keeps three times that in RoPE's fast half


@torch.no_grad()
def recall_init(model: LongVita, processor, seed: int) -> None:
    """Draws all weights of the model (scaled normal) and lays out the heads of this module's first lines in its decoder.

    The decoder needs at least two layers and two groups of heads, and a hidden size of at least three head sizes.
    """
    text = model.config.text
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "embed" not in name:
            gain = 0.35 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.7
            weight.normal_(0, gain * weight.shape[1] ** -0.5, generator=generator)
        elif name.endswith(("ls1", "ls2")):
            weight.fill_(0.1)
    model.model.embed_tokens.weight.normal_(0, 0.3, generator=generator)

    size = text.head_dim
    basis = torch.linalg.qr(torch.randn(text.hidden_size, 3 * size, generator=generator)).Q.T
    present, previous, asked = basis.split(size)
    look, match = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    _look_back(look, text, group=0, distance=1, read=present, write=previous)
    _look_back(look, text, group=1, distance=asked_distance(processor), read=present, write=asked)
    _match(match.k_proj.weight[:size], previous)
    for head in range(text.num_heads // text.num_kv_heads):
        _match(match.q_proj.weight[head * size : (head + 1) * size], present)


def _look_back(attention, text, *, group: int, distance: int, read: Tensor, write: Tensor) -> None:
    """Makes the heads of one group attend to the token `distance` positions back, read it along `read` and write it along `write`."""
    size, heads = text.head_dim, text.num_heads // text.num_kv_heads
    fast = size // 4  # the quickest half of RoPE's frequencies tell neighbours apart
    angles = distance * text.rope_theta ** (-torch.arange(fast) / (size // 2))
    rows = slice(group * size, (group + 1) * size)
    attention.k_proj.weight[rows] *= QUIET
    attention.k_proj.bias[rows][:fast] = STRENGTH
    attention.v_proj.weight[rows] = read
    for head in range(group * heads, (group + 1) * heads):
        rows = slice(head * size, (head + 1) * size)
        attention.q_proj.weight[rows] *= QUIET
        attention.q_proj.bias[rows][:fast] = STRENGTH * angles.cos()
        attention.q_proj.bias[rows][size // 2 : size // 2 + fast] = -STRENGTH * angles.sin()
        attention.o_proj.weight[:, rows] = write.T / heads


def _match(weight_DE: Tensor, read: Tensor) -> None:
    """Lets a head's q or k carry `read` in the dimensions of RoPE's slow half."""
    size = len(weight_DE)
    slow = torch.arange(size) % (size // 2) >= size // 4
    weight_DE *= 3 * QUIET
    weight_DE[slow] = MATCH * read[: int(slow.sum())]


def asked_distance(processor) -> int:
    """Distance in tokens from the token before the name in the answer back to the name in the question: past the chat template."""
    name = NAMES[0]
    turns = [
        {"role": "user", "content": "\n" + TEXT_QUESTION.format(name=name)},
        {"role": "assistant", "content": TEXT_ANSWER.format(name=name, digit=0)},
    ]
    ids = np.asarray(processor.encode(Sample(turns, placeholders=False)).input_ids)
    places = np.flatnonzero(ids == processor.tokenizer.encode(" " + name)[0])
    if len(places) != 2:
        raise ValueError(f"expected {name!r} as one token in question and answer, found {len(places)}: train the tokenizer on the codes")
    return int(places[1] - places[0]) - 1
