"""SDAR's generate.py on pydecode (JetAstra/SDAR, c2041a8)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import pydecode
from pydecode.sampling_arguments import batch_of

from .transfer import new_seed


def sample_with_temperature_topk_topp(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    *,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
) -> tuple[Tensor, Tensor]:
    """Samples a token of every row, and gives its probability under the law that it is from.

    Replaces ``sample_with_temperature_topk_topp`` (a copy, a sort, a scatter and two softmaxes).

    logits [..., V] -> (tokens int64 [...], their probabilities in logits' dtype [...]). Top-k
    first, then top-p on what it left. Temperature 0, where theirs divides by 0, is greedy, with the
    probability under the filtered law at temperature 1. ``seed`` is an int or [B] of [B, L, V].
    """
    if seed is None:
        seed = 0 if temperature == 0 else new_seed(batch_of(logits.shape[:-1]), logits.device)
    scores = pydecode.sample_and_score(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        tempered=True,
        seed=seed,
        offset=offset,
    )
    return scores.tokens, scores.confidence.to(logits.dtype)


@torch.no_grad()
def block_diffusion_generate(
    model: Any,
    prompt: Any,
    mask_id: int,
    gen_length: int = 128,
    block_length: int = 8,
    denoising_steps: int = 8,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    remasking_strategy: str = "low_confidence_dynamic",
    confidence_threshold: float = 0.85,
    eb_threshold: float | None = None,
    stopping_criteria_idx: Sequence[int] | None = None,
    *,
    past_key_values: Any = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """SDAR's generator: block after block, a finished block forwarded once more to store its K/V.

    Replaces ``block_diffusion_generate``. The model is called as there: ``model(block,
    attention_mask=.. [1, n, n + cached], position_ids=.., past_key_values=.., use_cache=True,
    store_kv=..)``, after ``model.eval()``. One ``unmask`` a step, and one read of the device,
    whether the block has masks left, as theirs (and one a block with ``stopping_criteria_idx``).
    Batches of any size; a request whose block is done waits.

    Args:
        prompt: {"input_ids": [B, P] int64}. remasking_strategy: "low_confidence_dynamic" (those
            over ``confidence_threshold`` if they are as many as the schedule's, else the surest),
            "low_confidence_static", "sequential", or "entropy_bounded" with ``eb_threshold``.
        stopping_criteria_idx: after a block, stop if every request has generated one of these.
        past_key_values: the cache; None: a new ``transformers.DynamicCache``.
        seed: int or [B]; None: from torch's generator.

    Returns:
        [B, ceil((P + gen_length) / block_length) * block_length] int64; masks past an early stop.

    Theirs overwrites committed tokens where a step's quota exceeds the masks left (its top-k falls
    on rows that are committed); ours stops at the masked ones. Its "entropy_bounded" fails on an
    undefined name; ours is EB-sampling: ascending H of the sampled law, while the sum of the
    earlier H is <= eb_threshold, in up to block_length steps. Temperature 0 is greedy.

    Raises:
        ValueError: an unknown strategy; eb_threshold missing; logits that fill nothing (NaN).
    """
    strategy = _strategy(remasking_strategy, confidence_threshold, eb_threshold)
    model.eval()
    input_ids = prompt["input_ids"]
    B, P = input_ids.shape
    if past_key_values is None:
        from transformers import DynamicCache

        past_key_values = DynamicCache()
    device = getattr(model, "device", input_ids.device)
    num_blocks = (P + gen_length + block_length - 1) // block_length
    x = torch.full((B, num_blocks * block_length), mask_id, dtype=torch.long, device=device)
    x[:, :P] = input_ids
    at = torch.arange(x.shape[1], device=device)
    sees = (at[:, None] // block_length >= at // block_length)[None].float()
    if seed is None:
        seed = 0 if temperature == 0 else new_seed(B, device)

    def forward(tokens: Tensor, start: int, end: int, store_kv: bool) -> Any:
        return model(
            tokens,
            attention_mask=sees[:, start:end, :end],
            position_ids=at[None, start:end],
            past_key_values=past_key_values,
            use_cache=True,
            store_kv=store_kv,
        )

    # a schedule ends with its steps; the entropy bound commits one a step at least
    limit = block_length if remasking_strategy == "entropy_bounded" else denoising_steps
    stops = None
    if stopping_criteria_idx is not None:
        stops = torch.tensor(list(stopping_criteria_idx), device=device)
    prefilled = P // block_length * block_length
    if prefilled > 0:
        forward(x[:, :prefilled], 0, prefilled, True)
    for start in range(prefilled, x.shape[1], block_length):
        end = start + block_length
        block = x[:, start:end].clone()
        for step in range(limit + 1):
            if not bool((block == mask_id).any()):
                forward(block, start, end, True)
                break
            if step == limit:
                raise ValueError(f"model: logits of block {start, end} that fill nothing (NaN?)")
            quota = block_length // denoising_steps + (step < block_length % denoising_steps)
            pydecode.unmask(
                block,
                forward(block, start, end, False).logits,
                mask_id=mask_id,
                out=block,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                tempered=True,
                seed=seed,
                offset=start // block_length * limit + step,
                **strategy(quota),
            )
        x[:, start:end] = block
        if stops is not None and bool(torch.isin(x[:, P:], stops).any(-1).all()):
            break
    return x


def _strategy(
    name: str, confidence_threshold: float, eb_threshold: float | None
) -> Callable[[int], dict[str, Any]]:
    """The arguments of ``unmask`` for a step whose quota is k."""
    if name == "low_confidence_dynamic":
        return lambda k: dict(
            rule="threshold", threshold=confidence_threshold, strict=True, min_commit=k
        )
    if name == "low_confidence_static":
        return lambda k: dict(rule="top_k", k=k, min_commit=0)
    if name == "sequential":
        return lambda k: dict(rule="sequential", k=k, min_commit=0)
    if name == "entropy_bounded":
        if eb_threshold is None:
            raise ValueError("eb_threshold: expected a number for 'entropy_bounded', got None")
        return lambda k: dict(rule="entropy_bound", threshold=eb_threshold)
    raise ValueError(
        "remasking_strategy: expected 'low_confidence_dynamic', 'low_confidence_static', "
        f"'sequential' or 'entropy_bounded', got {name!r}"
    )
