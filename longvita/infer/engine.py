"""Generation: whole prompts are read in chunks into a cache, then one token per step for all conversations at once.

    for piece in generate(model, processor, messages, max_new_tokens=100): print(piece, end="")     # one conversation, streamed
    answers = generate_ids(model, prompts, max_new_tokens=20)                                        # many, as token ids

Only rows whose logits are read go through the head: the last one of every prompt, and the new one of every running conversation.

Shapes: B conversations, T tokens of all prompts, E hidden size, M rows read, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from longvita.infer.sampling import Sampler, SamplingParams, TextStream, check_stop
from longvita.model.batch import Batch
from longvita.model.cache import KVCache
from longvita.model.long_vita import LongVita
from longvita_kernels import masked_lm_head

PREFILL_CHUNK = 8192  # tokens per pass: enough for full-speed matmuls, while activations stay small beside the cache
TILES_AT_ONCE = 64
TOKENS_AT_ONCE = 65536  # cache slots of the conversations that generate_ids runs together
GREEDY = SamplingParams()


def generate(
    model: LongVita,
    processor,
    messages,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
    seed: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Iterator[str]:
    """Streams the answer to one conversation as pieces of text that are safe to show.

    `messages` as the processor takes them, or a Batch it has made. Videos get the frames that leave room for the answer. Ends at an
    end-of-answer token (config.tokens.eos), before a stop string, or after `max_new_tokens`. temperature 0 is greedy.
    ValueError for parameters or messages that make no sense: raised by the call itself, before anything is generated.
    """
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, repetition_penalty=repetition_penalty, seed=seed)
    text = TextStream(processor.tokenizer, check_stop(stop))
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    room = model.config.text.max_position_embeddings - max_new_tokens
    batch = messages if isinstance(messages, Batch) else processor(messages, max_tokens=room)
    if len(batch.lengths) != 1:
        raise ValueError(f"generate streams one conversation, got {len(batch.lengths)}: call it for each, or use generate_ids for many")
    steps = _run(model, batch, params, max_new_tokens=max_new_tokens, prefill_chunk=prefill_chunk)
    return _pieces(steps, text)


def _pieces(steps: Iterator[list[tuple[int, int]]], text: TextStream) -> Iterator[str]:
    for ((_, token),) in steps:
        piece = text.push(token)
        if piece:
            yield piece
        if text.stopped:
            return
    piece = text.finish()
    if piece:
        yield piece


def generate_ids(
    model: LongVita,
    prompts: Batch | Iterable[Batch | Sequence[int]],
    *,
    max_new_tokens: int,
    params: SamplingParams = GREEDY,
    stop_tokens: Sequence[int] | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    tokens_at_once: int = TOKENS_AT_ONCE,
) -> list[list[int]]:
    """The generated ids of every conversation, without the token that stopped it.

    `prompts`: one packed Batch, or any iterable of Batches and lists of ids, read lazily: as many conversations as fit `tokens_at_once`
    cache slots run together, so neighbours of similar length are best. A result does not depend on the grouping.
    stop_tokens None: config.tokens.eos.
    """
    results: list[list[int]] = []
    for batch in _groups([prompts] if isinstance(prompts, Batch) else prompts, max_new_tokens, tokens_at_once):
        first = len(results)
        results += [[] for _ in batch.lengths]
        for step in _run(
            model, batch, params, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens, prefill_chunk=prefill_chunk, first_index=first
        ):
            for conversation, token in step:
                results[first + conversation].append(token)
    return results


def _groups(prompts: Iterable[Batch | Sequence[int]], max_new_tokens: int, tokens_at_once: int) -> Iterator[Batch]:
    """Joins prompts, in order, while conversations × (longest + answer) stays within the budget; a single prompt may exceed it."""
    waiting, count, longest = [], 0, 0
    for prompt in prompts:
        batch = prompt if isinstance(prompt, Batch) else Batch.from_ids([prompt])
        longest_with = max(longest, batch.max_seqlen)
        if waiting and (count + len(batch.lengths)) * (longest_with + max_new_tokens) > tokens_at_once:
            yield Batch.join(waiting)
            waiting, count, longest_with = [], 0, batch.max_seqlen
        waiting.append(batch)
        count, longest = count + len(batch.lengths), longest_with
    if waiting:
        yield Batch.join(waiting)


def _run(
    model: LongVita,
    batch: Batch,
    params: SamplingParams,
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int] | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    first_index: int = 0,
) -> Iterator[list[tuple[int, int]]]:
    """Yields, step by step, (conversation, token) of every conversation still running; checks its arguments at once."""
    if max_new_tokens < 1 or prefill_chunk < 1:
        raise ValueError(f"max_new_tokens and prefill_chunk must be at least 1, got {max_new_tokens} and {prefill_chunk}")
    batch = batch.to(model.device).validate(model.config)
    if 0 in batch.lengths:
        raise ValueError(f"conversation {batch.lengths.index(0)} has no tokens: there is nothing to continue")
    limit = model.config.text.max_position_embeddings
    if batch.max_seqlen + max_new_tokens > limit:
        raise ValueError(
            f"{batch.max_seqlen} prompt tokens + max_new_tokens {max_new_tokens} exceed the model's {limit} positions: "
            "shorten the prompt or the answer"
        )
    stops = frozenset(model.config.tokens.eos if stop_tokens is None else stop_tokens)
    return _steps(model, batch, params, max_new_tokens, stops, prefill_chunk, first_index)


def _steps(model, batch, params, max_new_tokens, stops, prefill_chunk, first_index):
    cache = KVCache(
        model.config.text, len(batch.lengths), capacity=batch.max_seqlen + max_new_tokens, device=model.device, dtype=model.dtype
    )
    sampler = Sampler(params, batch.input_ids.split(batch.lengths), model.config.text.vocab_size, first_index)
    logits_MV = _prefill(model, batch, cache, prefill_chunk)
    running = list(range(len(batch.lengths)))
    for left in reversed(range(max_new_tokens)):
        tokens = sampler(logits_MV, running)
        step = [(i, token) for i, token in zip(running, tokens, strict=True) if token not in stops]
        if not step:
            return
        yield step
        if not left:
            return
        running = [i for i, _ in step]
        logits_MV = _decode(model, step, cache)


@torch.no_grad()
def _prefill(model: LongVita, batch: Batch, cache: KVCache, chunk: int) -> Tensor:
    """Reads all prompts, `chunk` tokens of the packed row at a time; the logits (B, V) after each prompt's last token."""
    x_TE = model.embed(batch, TILES_AT_ONCE)
    bounds = batch.cu_seqlens.tolist()
    logits = []
    for start in range(0, batch.num_tokens, chunk):
        end = min(start + chunk, batch.num_tokens)
        step = cache.begin([max(0, min(end, b) - max(start, a)) for a, b in pairwise(bounds)])
        hidden_TE = model.decode(x_TE[start:end], batch.position_ids[start:end], step)
        step.commit()
        rows = [b - 1 - start for b in bounds[1:] if start < b <= end]
        if rows:
            logits.append(masked_lm_head(hidden_TE, model.head_weight, torch.tensor(rows, device=hidden_TE.device)))
    return torch.cat(logits)


@torch.no_grad()
def _decode(model: LongVita, step: list[tuple[int, int]], cache: KVCache) -> Tensor:
    """One token of each running conversation; the logits (M, V) after it. Conversations that have ended bring no token and cost nothing."""
    device = model.device
    running = {i for i, _ in step}
    positions = torch.tensor([cache.lengths[i] for i, _ in step], device=device)
    plan = cache.begin([int(i in running) for i in range(cache.batch_size)])
    x_ME = model.model.embed_tokens(torch.tensor([token for _, token in step], device=device))
    hidden_ME = model.decode(x_ME, positions, plan)
    plan.commit()
    return masked_lm_head(hidden_ME, model.head_weight, torch.arange(len(step), device=device))
