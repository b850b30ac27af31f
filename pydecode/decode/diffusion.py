"""Masked-diffusion decoding, whole: one forward pass, one ``unmask``, repeat, block after block.

LLaDA (Nie et al., 2025), Dream (``shift=1``), block diffusion (BD3-LM, SDAR, LLaDA2), with the
caches of Fast-dLLM (Wu et al., 2025); see ``passes`` for what each kind of cache feeds a model.

A **model** is a callable that is handed rows, positions, a cache and a mask::

    logits = model(tokens [B, N], positions [B, N], cache, mask, keep=rows whose logits are wanted)
             -> [B, N or number of kept rows, V]

``positions`` are rotary positions. In each layer the model calls
``cache.attend(layer, q, k, v, mask)``, with q and k already rotated, in place of its own attention.
``mask`` is None (all rows see each other) or ranks [1|B, N] (row i sees row j iff mask[j] <=
mask[i]), ``keep`` a slice, or in ``self_speculative`` a tensor of row indices: ``hidden[:, keep]``.
A bidirectional model that knows nothing of caches takes part under ``cache="none"``:
``lambda tokens, positions, cache, mask, keep: net(tokens)``.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pydecode

from .passes import Block, prepare


class DiffusionResult(NamedTuple):
    """What ``generate`` returns."""

    tokens: Tensor  # int64 [B, P + length]
    order: Tensor  # int64 [B, length]: the request's own step that filled a position; -1: no step
    num_steps: Tensor  # int64 [B], steps at whose start the request still had masks in its block
    num_forwards: int  # model calls, for the whole batch


@dataclass(frozen=True)
class Step:
    """Where the loop stands, for arguments that are functions of it and for ``on_step``."""

    index: int  # within the block
    block: Block
    tokens: Tensor  # [B, P + length]
    logits: Tensor  # [B, generated positions of the block, + 1 under shift, V]
    unmasked: pydecode.Unmasked | None = None  # for on_step: what this step did


def generate(
    model: Callable[..., Tensor],
    prompt: Tensor,
    *,
    length: int,
    block_length: int,
    mask_id: int,
    rule: str = "top_k",
    steps_per_block: int | None = None,
    cache: str = "none",
    kv: tuple[Tensor, Tensor] | None = None,
    shift: int = 0,
    prompt_lengths: Tensor | None = None,
    offset: int = 0,
    eos_id: int | None = None,
    on_step: Callable[[Step], Any] | None = None,
    **arguments: Any,
) -> DiffusionResult:
    """Generates ``length`` tokens a request by unmasking one block of them after the other.

    Args:
        model: a callable as above.
        prompt: [B, P] int64, left-padded where ragged; its masks, if any, are left alone.
        length: tokens to generate. block_length: need not divide it; the last block is shorter.
        rule: of ``unmask``. ``arguments`` go there too (k, threshold, temperature, seed, ..); one
            that is callable is called with the ``Step``: ``threshold=lambda s: 1 - s.index / 50``,
            ``external_score=lambda s: filter(s)``, [B, P + length].
        steps_per_block: for top_k and sequential LLaDA's schedule: of m masks, m // steps a step
            and one more in the first m % steps. For posterior keep = (steps - 1 - i) / (steps - i)
            in step i, so that the last one leaves nothing (default: block_length steps).
        cache: "none", "prefix", "dual" or "block_causal"; see ``passes``.
        kv: (K, V), each [layers, B, S >= P + length, Hkv, D], any content, for the last three.
            "block_causal" without: nothing is kept, the same result for more work.
        shift: 1: position i's token comes from row i - 1 (Dream, Fast-dLLM v2).
        prompt_lengths: [B], the valid tokens at the end of each prompt; None: P. Block-causal
            blocks lie on multiples of block_length, so there the padding is whole blocks.
        offset: added to the step's index within its block, which is the draws' offset. A request's
            draws then depend on its seed (with ``seed`` [B]) and its own progress alone.
        eos_id: after a block, all that follows a request's first generated eos_id becomes eos_id.
        on_step: called with the ``Step`` after each unmasking.

    A request whose block is done waits for the others. The host reads one flag a step, whether any
    mask of the block is left. Every rule ends: each step fills at least one position a request.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name; or a model with NaN logits.

    >>> import torch
    >>> from pydecode.decode import diffusion
    >>> def model(tokens, positions, cache, mask, keep):  # sure that position i holds token i
    ...     return 9 * torch.nn.functional.one_hot(positions, 12)[:, keep].float()
    >>> result = diffusion.generate(
    ...     model, torch.tensor([[0, 1]]), length=6, block_length=3, mask_id=11, rule="threshold"
    ... )
    >>> result.tokens.tolist(), result.num_forwards
    ([[0, 1, 2, 3, 4, 5, 6, 7]], 2)
    """
    expect_rule(rule, steps_per_block, arguments)
    passes = prepare(
        *(model, prompt, length, block_length, mask_id, cache, kv, shift, prompt_lengths)
    )
    B, P = prompt.shape
    tokens = torch.cat([prompt, prompt.new_full((B, length), mask_id)], dim=1)
    order, num_steps = torch.full_like(tokens, -1), prompt.new_zeros(B)
    for block in passes.blocks():
        left = masks = (tokens[:, block.begin : block.stop] == mask_id).sum(1)
        limit = steps_per_block if rule == "posterior" else None
        limit = limit or block.stop - block.begin
        index = 0
        while bool((left > 0).any()):
            if index == limit:
                raise ValueError(
                    f"model: logits of block {list(block)} that no rule can fill (NaN?)"
                )
            logits = passes(tokens, block, fresh=index == 0)
            step = Step(index, block, tokens, logits)
            given = schedule(rule, steps_per_block, masks, index, limit)
            given |= {name: x(step) if callable(x) else x for name, x in arguments.items()}
            if rule == "posterior" and index == limit - 1:
                given["keep"] = 0.0
            unmasked = pydecode.unmask(
                tokens,
                logits,
                mask_id=mask_id,
                rule=rule,
                shift=shift,
                window=(block.begin, block.stop - block.begin),
                offset=offset + index,
                positions=passes.positions,
                **given,
            )
            order = torch.where(unmasked.committed, num_steps[:, None], order)
            num_steps = num_steps + (left > 0)
            tokens, left = unmasked.tokens, unmasked.num_left
            index += 1
            if on_step is not None:
                on_step(replace(step, tokens=tokens, unmasked=unmasked))
        tokens = fill_after_eos(tokens, P, block.stop, eos_id)
    return DiffusionResult(tokens, order[:, P:], num_steps, passes.count)


def fill_after_eos(tokens: Tensor, prompt: int, done: int, eos_id: int | None) -> Tensor:
    """All that follows the first eos_id of [prompt, done) becomes eos_id."""
    if eos_id is None:
        return tokens
    at = torch.arange(tokens.shape[1], device=tokens.device)
    eos = (tokens == eos_id) & (at >= prompt) & (at < done)
    return torch.where(eos.cumsum(1) > 0, eos_id, tokens)


def schedule(
    rule: str, steps: int | None, masks: Tensor, index: int | Tensor, limit: int
) -> dict[str, Any]:
    """What a schedule says of step ``index`` of a block that had ``masks`` [B] masks."""
    if rule == "posterior":
        return {"keep": (limit - 1 - index) / (limit - index)}
    if steps is None:
        return {}
    return {"k": masks // steps + (index < masks % steps)}


def expect_rule(rule: str, steps: int | None, arguments: dict[str, Any]) -> None:
    if rule != "posterior" and arguments.get("min_commit") == 0:
        raise ValueError("min_commit: expected at least 1 in a loop, which has to end, got 0")
    if steps is None:
        return
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps_per_block: expected None or an integer >= 1, got {steps!r}")
    if rule not in ("top_k", "sequential", "posterior"):
        raise ValueError(f"steps_per_block: expected None with rule={rule!r}, got {steps}")
    if "k" in arguments:
        raise ValueError("k: expected none with steps_per_block, which sets it")
