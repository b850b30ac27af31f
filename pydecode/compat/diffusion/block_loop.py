"""Fast-dLLM's loop over blocks, and what each of its caches feeds the model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pydecode

from .fast_dllm_rules import get_transfer_index_dynamic
from .llada import canvas, get_num_transfer_tokens, split_steps
from .transfer import confidence_of, new_seed

Model = Callable[..., Any]
# The block's i-th forward: its logits, and the position of their first row.
Forward = Callable[[int], tuple[Tensor, int]]


def no_cache(model: Model, x: Tensor, start: int, end: int) -> Forward:
    return lambda i: (model(x).logits, 0)


def prefix_cache(model: Model, x: Tensor, start: int, end: int) -> Forward:
    past: list[tuple[Tensor, ...]] = []

    def forward(i: int) -> tuple[Tensor, int]:
        if i > 0:
            return model(x[:, start:], past_key_values=past, use_cache=True).logits, start
        output = model(x, use_cache=True)
        past[:] = [tuple(kv[:, :, :start] for kv in layer) for layer in output.past_key_values]
        return output.logits, 0

    return forward


def dual_cache(model: Model, x: Tensor, start: int, end: int) -> Forward:
    caches: list[Any] = []
    replace = torch.zeros_like(x, dtype=torch.bool)
    replace[:, start:end] = True

    def forward(i: int) -> tuple[Tensor, int]:
        if i == 0:
            output = model(x, use_cache=True)
            caches.append(output.past_key_values)
            return output.logits, 0
        output = model(
            x[:, start:end], past_key_values=caches[0], use_cache=True, replace_position=replace
        )
        return output.logits, start

    return forward


@torch.no_grad()
def run(
    passes: Callable[[Model, Tensor, int, int], Forward],
    model: Model,
    prompt: Tensor,
    steps: int,
    gen_length: int,
    block_length: int,
    temperature: float,
    remasking: str,
    mask_id: int,
    threshold: float | None,
    factor: float | None,
    step_callback: Callable[[int], Any] | None,
    bug_compatible: bool,
    seed: int | Tensor | None,
) -> tuple[Tensor, int]:
    """(x, number of forwards): block after block, until each has no masks left."""
    confidence = confidence_of(remasking)
    P = prompt.shape[1]
    steps = split_steps(gen_length, block_length, steps)[1]
    x = canvas(model, prompt, gen_length, mask_id)
    if seed is None:
        drawn = temperature > 0 or remasking == "random"
        seed = new_seed(x.shape[0], x.device) if drawn else 0
    nfe = 0
    for start in range(P, P + gen_length, block_length):
        end = start + block_length
        block = x[:, start:end]
        num_transfer = get_num_transfer_tokens(block == mask_id, steps)
        forward = passes(model, x, start, end)
        i, left = 0, True
        while left:
            if i == max(steps, end):  # each step fills a mask, the schedule's last one all
                raise ValueError(f"model: logits of block {start, end} that fill nothing (NaN?)")
            logits, first = forward(i)
            # masks of the prompt, if any, are filled by a block's full forwards, as theirs are
            part, rows = x[:, first:end], logits[:, : end - first]
            if factor is not None and bug_compatible:
                masked = part == mask_id
                x0, taken = get_transfer_index_dynamic(
                    *(rows, temperature, remasking, masked, part, None, factor),
                    bug_compatible=True,
                    mask_id=mask_id,
                    seed=seed,
                    offset=nfe,
                )
                part.copy_(torch.where(taken, x0, part))
            else:
                if factor is not None:
                    rule: dict[str, Any] = dict(rule="factor", factor=factor)
                elif threshold is not None:
                    rule = dict(rule="threshold", threshold=threshold)
                else:
                    k = num_transfer[:, i] if i < steps else end
                    rule = dict(rule="top_k", k=k, min_commit=0)
                pydecode.unmask(
                    part,
                    rows,
                    mask_id=mask_id,
                    out=part,
                    temperature=temperature,
                    confidence=confidence,
                    seed=seed,
                    offset=nfe,
                    **rule,
                )
            nfe += 1
            i += 1
            if step_callback is not None:
                step_callback(nfe - 1)
            left = bool((block == mask_id).any())  # the one read of the device in a step
    return x, nfe
