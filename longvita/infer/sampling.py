"""From logits to tokens, and from tokens to text that can be shown at once.

Order of the filters, as elsewhere: repetition penalty, temperature, top_k, top_p. Each prompt draws from its own random stream (seed,
index of the prompt), so a result does not depend on what else is in the batch.

Shapes: M rows, one per prompt still running; V vocabulary.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """temperature 0 is greedy; top_p 1 and top_k 0 keep every token; repetition_penalty 1 does nothing; seed None differs in every run."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1 (all tokens), got {self.top_p}")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k must be a whole number, 0 for all tokens, got {self.top_k!r}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be above 0 (1 changes nothing), got {self.repetition_penalty}")


class Sampler:
    """Draws the next token of several prompts; remembers what each has seen if repetition is penalised."""

    def __init__(self, params: SamplingParams, prompts: Sequence[Tensor], vocab_size: int, first_index: int = 0):
        self.params = params
        self.streams = [random.Random(None if params.seed is None else f"{params.seed}/{first_index + i}") for i in range(len(prompts))]
        self.seen_BV = None
        if params.repetition_penalty != 1.0:
            self.seen_BV = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=prompts[0].device)
            for seen_V, prompt in zip(self.seen_BV, prompts, strict=True):
                seen_V[prompt] = True

    def __call__(self, logits_MV: Tensor, prompts: Sequence[int]) -> list[int]:
        """Row i of the logits belongs to prompt prompts[i]. RuntimeError if a logit is NaN or infinite."""
        logits_MV = logits_MV.float()
        if not torch.isfinite(logits_MV).all():
            raise RuntimeError(
                "the model gave logits that are not finite: its weights are damaged, or its dtype overflows (try bfloat16 or float32)"
            )
        if self.seen_BV is not None:
            penalty = self.params.repetition_penalty
            penalised = torch.where(logits_MV > 0, logits_MV / penalty, logits_MV * penalty)
            logits_MV = torch.where(self.seen_BV[list(prompts)], penalised, logits_MV)
        ids_M = logits_MV.argmax(-1) if self.params.temperature == 0 else self._draw(logits_MV, prompts)
        if self.seen_BV is not None:
            self.seen_BV[list(prompts), ids_M] = True
        return ids_M.tolist()

    def _draw(self, logits_MV: Tensor, prompts: Sequence[int]) -> Tensor:
        kept = min(self.params.top_k or logits_MV.shape[1], logits_MV.shape[1])
        top_MK, ids_MK = logits_MV.topk(kept)  # sorted, most likely first
        probabilities_MK = torch.softmax(top_MK.double() / self.params.temperature, dim=-1)
        before_MK = probabilities_MK.cumsum(-1) - probabilities_MK
        probabilities_MK = probabilities_MK.masked_fill(before_MK >= self.params.top_p, 0.0)
        cumulative_MK = probabilities_MK.cumsum(-1)
        uniform_M1 = cumulative_MK.new_tensor([[self.streams[i].random()] for i in prompts])
        choice_M1 = torch.searchsorted(cumulative_MK, uniform_M1 * cumulative_MK[:, -1:], right=True)
        last_M1 = (probabilities_MK > 0).sum(-1, keepdim=True) - 1
        return ids_MK.gather(1, torch.minimum(choice_M1, last_M1)).squeeze(1)


class TextStream:
    """Tokens in, text out as soon as it is certain: never half a character, never text that may belong to a stop string.

    What was pushed and not stopped comes out in full: the pieces joined equal the decoded tokens, up to the first stop string.
    """

    def __init__(self, tokenizer, stop: Iterable[str] = ()):
        self._decoder, self._stop = tokenizer.stream(), check_stop(stop)
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain after one more token; often empty."""
        return self._take(self._decoder.push(token))

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        text = self._take(self._decoder.flush()) + self._held
        self._held = ""
        return text

    def _take(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        hits = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if hits:
            self.stopped, self._held = True, ""
            return text[: min(hits)]
        keep = max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def check_stop(stop: Iterable[str]) -> tuple[str, ...]:
    """Stop strings as a tuple; a single string is one of them."""
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in stop:
        if not isinstance(text, str) or not text:
            raise ValueError(f"stop must hold non-empty strings, got {text!r}")
    return stop
