"""The whole generators of LLaDA and Fast-dLLM as they document them, one request at a time."""

import math
from typing import Any

import torch
from fake_diffusion import MASK
from peer_diffusion import Scores, fast_factor, fast_threshold, fixed, proposals
from torch import Tensor


def quotas(masks: int, steps: int) -> list[int]:
    return [masks // steps + (i < masks % steps) for i in range(steps)]


def fill(x: Tensor, logits: Tensor, window: tuple[int, int], choose: Any) -> None:
    """x [1, N] in place from logits of positions [first, ..): choose(c, h) -> positions."""
    first, end = window
    masked = [i for i in range(end - first) if x[0, first + i] == MASK]
    token, c, h = proposals(logits[0], masked)
    for i in choose(c, h):
        x[0, first + i] = token[i]


def llada(
    model: Any,
    prompt: Tensor,
    attention_mask: Tensor | None = None,
    *,
    steps: int,
    gen_length: int,
    block_length: int,
    cfg_scale: float = 0.0,
    eos: int | None = None,
    late: tuple[int, ...] = (),
) -> Tensor:
    """LLaDA's generator at temperature 0; eos: forbidden; late: confidence 0, out of the law."""
    x = torch.cat([prompt, prompt.new_full((1, gen_length), MASK)], 1)
    if attention_mask is not None:
        ones = attention_mask.new_ones(1, gen_length)
        attention_mask = torch.cat([attention_mask, ones], 1)
    is_prompt = x != MASK
    blocks = gen_length // block_length
    for n in range(blocks):
        end = prompt.shape[1] + (n + 1) * block_length
        for quota in quotas(block_length, steps // blocks):
            if cfg_scale > 0:
                free = torch.where(is_prompt, MASK, x)
                both = attention_mask
                if both is not None:
                    both = torch.cat([both, both])
                logits, without = model(torch.cat([x, free]), attention_mask=both).logits.chunk(2)
                logits = without + (cfg_scale + 1) * (logits - without)
            else:
                logits = model(x, attention_mask=attention_mask).logits.clone()
            if eos is not None:
                logits[..., eos] = -math.inf
            masked = [i for i in range(end) if x[0, i] == MASK]
            token, c, _ = proposals(logits[0], masked)
            if late:
                logits[..., list(late)] = -math.inf
                p = torch.softmax(logits[0], -1)
                c = {i: float(p[i, token[i]]) for i in masked}
            for i in fixed(c, quota):
                x[0, i] = token[i]
    return x


def fast_dllm(
    model: Any,
    prompt: Tensor,
    cache: str,
    *,
    steps: int,
    gen_length: int,
    block_length: int,
    threshold: float | None = None,
    factor: float | None = None,
    quirk: bool = False,
) -> tuple[Tensor, int]:
    """Fast-dLLM's three generators at temperature 0: a full forward opens each block."""
    x = torch.cat([prompt, prompt.new_full((1, gen_length), MASK)], 1)
    N, nfe = x.shape[1], 0
    for start in range(prompt.shape[1], N, block_length):
        end = start + block_length
        schedule = quotas(block_length, steps * block_length // gen_length)
        i, past = 0, None

        def choose(c: Scores, h: Scores, i: int, schedule: list[int] = schedule) -> set[int]:
            if factor is not None:
                return fast_factor(c, factor, quirk)
            return fixed(c, schedule[i]) if threshold is None else fast_threshold(c, threshold)

        while i == 0 or MASK in x[0, start:end].tolist():
            first = start if past is not None else 0
            if cache == "none":
                logits = model(x).logits
            elif past is None:
                out = model(x, use_cache=True)
                logits, past = out.logits, out.past_key_values
                if cache == "prefix":
                    past = [tuple(kv[:, :, :start] for kv in layer) for layer in past]
            elif cache == "prefix":
                logits = model(x[:, start:], past_key_values=past, use_cache=True).logits
            else:
                where = torch.zeros(1, N, dtype=torch.bool)
                where[:, start:end] = True
                logits = model(
                    x[:, start:end], past_key_values=past, use_cache=True, replace_position=where
                ).logits
            fill(x, logits, (first, end), lambda c, h: choose(c, h, i))  # noqa: B023
            nfe, i = nfe + 1, i + 1
    return x, nfe
