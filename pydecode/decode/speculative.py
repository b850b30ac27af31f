"""Speculative decoding, whole: draft, verify in one forward pass, commit, repeat.

Leviathan et al., "Fast inference from transformers via speculative decoding" (ICML 2023); trees as
in SpecInfer (Miao et al., ASPLOS 2024). Greedy output equals plain greedy decoding token for token
(up to the rounding of the model's own forward pass), sampled output has the target's law.

A **model** is a callable that is handed rows, positions, a cache and a mask::

    logits = model(tokens [B, N], positions [B, N], cache, mask, num_tokens=[B] | None,
                   keep=rows whose logits are wanted | None) -> [B, N or len(keep), V]

It writes the rows' keys and values at cache slots ``cache.lengths[b] + i`` and attends with
``tree_attention``; ``compat.transformers.CausalLM`` is one. The cache holds the context less the
last committed token, which is always row 0 of the next forward pass.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pydecode

from .cache import PagedCache
from .drafters import Draft, Drafter, Nothing
from .prefill import prefill


class Generation(NamedTuple):
    """What ``generate`` returns, a list a request."""

    tokens: list[list[int]]  # new tokens, a stop token included
    accepted: list[list[int]]  # accepted drafts of each step
    drafted: list[list[int]]  # drafted tokens of each step (a tree: its nodes less the root)
    steps: int  # verification passes, the prompt's passes not counted


def generate(
    model: Callable[..., Tensor],
    prompts: Sequence[Sequence[int]],
    *,
    cache: PagedCache,
    max_new_tokens: int,
    drafter: Drafter | None = None,
    stop_tokens: Collection[int] = (),
    temperature: float = 0.0,
    rule: str | None = None,
    seed: int | Tensor = 0,
    prefill_chunk: int = 512,
    on_tokens: Callable[[int, list[int]], Any] | None = None,
    should_stop: Callable[[int, int], bool] | None = None,
    **filters: Any,
) -> Generation:
    """Generates up to ``max_new_tokens`` a request, several a step.

    Args:
        model: a callable as above. prompts: one or more token ids a request, ragged.
        cache: an empty cache for these requests; room for prompt + max_new_tokens + drafted rows.
        drafter: see ``drafters``; None decodes plainly, one token a step.
        stop_tokens: a request ends with the first of these, also inside an accepted path.
        temperature: 0 is greedy; else ``top_k``, ``top_p`` and ``min_p`` go to rejection sampling.
        rule: of ``rejection_sample`` (chains) or ``rejection_sample_tree``; None: their default.
        seed: number or [B]; a request's draws depend on its seed and positions alone if [B].
        on_tokens: called with (request, new tokens) after every step.
        should_stop: called with (request, token) for every new token in turn that is no stop token;
            true ends the request with it, also inside an accepted path.

    The host reads the verified tokens once a step, to look for stop tokens.
    """
    device = cache.lengths.device
    drafter = drafter or Nothing()
    sequences = [list(prompt) for prompt in prompts]
    for b, prompt in enumerate(sequences):
        if not prompt:
            raise ValueError(f"prompts: expected at least one token a request, got none in {b}")
    prefill(model, [prompt[:-1] for prompt in sequences], cache, prefill_chunk)
    ends = [len(prompt) + max_new_tokens for prompt in sequences]
    result = Generation([[] for _ in prompts], [[] for _ in prompts], [[] for _ in prompts], 0)
    running = [max_new_tokens > 0] * len(sequences)
    steps = 0
    drafter.start(sequences, cache)
    while any(running):
        # draft, and verify all drafted rows in one forward pass
        room = [end - len(s) - 1 if r else 0 for end, s, r in zip(ends, sequences, running)]
        last = torch.tensor([s[-1] for s in sequences], device=device)
        draft = drafter.propose(sequences, last, cache, room)
        rows = draft.rows(last)
        logits = model(
            rows,
            cache.lengths[:, None] + draft.depths(rows),
            cache,
            draft.mask(),
            num_tokens=draft.num_tokens,
        )
        verified = _verify(draft, logits, cache, temperature, rule, seed, filters)
        steps += 1

        # keep what was accepted; requests that have ended keep their cache as it is
        alive = torch.tensor(running, device=device)
        path = torch.where(alive[:, None], verified.path, -1)
        cache.commit(path, verified.num_accepted)
        emitted, accepted = verified.tokens.tolist(), verified.num_accepted.tolist()
        drafted = draft.num_drafts.tolist()
        for b in [b for b, r in enumerate(running) if r]:
            if emitted[b][0] < 0:
                raise ValueError(f"model: request {b} has NaN among its logits after {steps} steps")
            room_left = ends[b] - len(sequences[b])
            new, running[b] = [], room_left > accepted[b] + 1
            for token in emitted[b][: min(room_left, accepted[b] + 1)]:
                new.append(token)
                if token in stop_tokens or (should_stop is not None and should_stop(b, token)):
                    running[b] = False
                    break
            sequences[b] += new
            result.tokens[b].extend(new)
            result.accepted[b].append(min(accepted[b], len(new)))
            result.drafted[b].append(drafted[b])
            if not running[b]:  # the path may reach past the end: the cache forgets that part
                cache.lengths[b] = len(sequences[b]) - 1
            if on_tokens is not None:
                on_tokens(b, new)
        drafter.update(accepted)
    return result._replace(steps=steps)


def _verify(
    draft: Draft,
    logits: Tensor,
    cache: PagedCache,
    temperature: float,
    rule: str | None,
    seed: int | Tensor,
    filters: dict[str, Any],
) -> pydecode.Verified:
    tree: dict[str, Any] = {} if draft.parents is None else {"max_depth": draft.max_depth}
    if temperature == 0:
        return pydecode.verify_greedy(
            draft.tokens, logits, parents=draft.parents, num_drafts=draft.num_drafts, **tree
        )
    arguments: dict[str, Any] = dict(
        draft_logits=draft.logits,
        num_drafts=draft.num_drafts,
        temperature=temperature,
        seed=seed,
        positions=cache.lengths + 1,  # of the first drafted token: a new one in every step
        **({} if rule is None or not draft.tokens.shape[1] else {"rule": rule}),
        **filters,
    )
    if draft.parents is None:
        return pydecode.rejection_sample(logits, draft.tokens, **arguments)
    return pydecode.rejection_sample_tree(logits, draft.tokens, draft.parents, **arguments, **tree)
