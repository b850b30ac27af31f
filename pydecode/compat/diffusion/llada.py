"""LLaDA's generate.py on pydecode: the schedule and the generator (ML-GSAI/LLaDA, b7e6c35).

``add_gumbel_noise`` is left out: the fp64 pass over all logits that it makes is what the ops
replace. Hand ``temperature`` to ``generate`` or to ``pydecode.unmask``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pydecode

from .transfer import as_rows, confidence_of, excluded, new_seed

EOS, EOT = 126081, 126348


def get_num_transfer_tokens(mask_index: Tensor, steps: int) -> Tensor:
    """How many tokens each step commits: of m masks m // steps, one more in the first m % steps.

    Replaces ``get_num_transfer_tokens`` of LLaDA, Fast-dLLM and dInfer, which loop over the batch
    and read the device.

    mask_index [B, L] bool -> int64 [B, steps].
    """
    late, divisor = _schedule(steps, mask_index)
    return mask_index.sum(1, True).sub(late).floor_divide_(divisor)  # (m - i) / steps, rounded up


# What a schedule needs beside the masks, by steps and device: two of its five launches.
_SCHEDULES: dict[Any, tuple[Tensor, Tensor]] = {}


def _schedule(steps: int, like: Tensor) -> tuple[Tensor, Any]:
    """1 - steps .. 0, and steps, on the tensor's device."""
    # a traced tensor, or a captured graph's memory, must not outlive its trace
    kept = not torch.compiler.is_compiling() and type(like) is Tensor and type(steps) is int
    if kept and (found := _SCHEDULES.get((steps, like.device))) is not None:
        return found
    late = torch.arange(1 - steps, 1, device=like.device)
    if not kept or type(late) is not Tensor or _capturing(late):
        return late, steps
    if len(_SCHEDULES) >= 64:  # schedules of that many lengths
        _SCHEDULES.clear()
    made = late, torch.full((), steps, dtype=late.dtype, device=like.device)
    return _SCHEDULES.setdefault((steps, like.device), made)


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


@torch.no_grad()
def generate(
    model: Callable[..., Any],
    prompt: Tensor,
    attention_mask: Tensor | None = None,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
    *,
    seed: int | Tensor | None = None,
    eos_id: int = EOS,
    eot_id: int = EOT,
) -> Tensor:
    """LLaDA's generator: ``steps // blocks`` forwards a block, one ``unmask`` each, no host read.

    Replaces ``generate``. The model is called as there, ``model(x, attention_mask=...).logits``,
    and only masked rows up to the block's end are read.

    Args:
        prompt: [B, P] int64, left-padded where ragged. attention_mask: [B, P].
        cfg_scale: two forwards in one batch, whose logits the model side combines: that pass over
            V-sized tensors stays. Theirs raises NameError without an attention_mask; ours runs.
        confidence_eos_eot_inf: EOS and EoT are scored 0 and are no part of the others' confidence
            (LLaDA, appendix B.4), at the cost of reading the rows twice. At temperature > 0 theirs
            forgets EOS; ours removes both at any temperature.
        seed: int or [B]; None: from torch's generator. eos_id, eot_id: theirs are constants.

    Returns:
        [B, P + gen_length] int64.

    Raises:
        ValueError: gen_length or steps that do not divide into blocks. NotImplementedError: an
            unknown ``remasking``.

    Where fewer rows are masked than a step should commit, theirs picks committed ones too, to no
    effect; ours stops at the masked ones. Rows with NaN stay masked, which nothing here reads.
    """
    B, P = prompt.shape
    blocks, steps = split_steps(gen_length, block_length, steps)
    x = canvas(model, prompt, gen_length, mask_id)
    if attention_mask is not None:
        ones = attention_mask.new_ones(B, gen_length)
        attention_mask = torch.cat([attention_mask, ones], dim=-1).to(x.device)
    prompt_index = x != mask_id if cfg_scale > 0.0 else None
    if seed is None and (temperature > 0 or remasking == "random"):
        seed = new_seed(B, x.device)
    scoring: dict[str, Any] = dict(
        temperature=temperature,
        confidence=confidence_of(remasking),
        seed=0 if seed is None else seed,
    )
    late = (eos_id, eot_id) if confidence_eos_eot_inf and remasking != "random" else None
    for block in range(blocks):
        end = P + (block + 1) * block_length
        part = x[:, :end]
        num_transfer = get_num_transfer_tokens(part[:, end - block_length :] == mask_id, steps)
        for i in range(steps):
            logits = forward(model, x, attention_mask, prompt_index, mask_id, cfg_scale)[:, :end]
            scoring["exclude_ids"] = [eos_id] if logits_eos_inf else []
            scoring["offset"] = block * steps + i
            rule: dict[str, Any] = dict(rule="top_k", k=num_transfer[:, i], min_commit=0)
            if late is None:
                pydecode.unmask(part, logits, mask_id=mask_id, out=part, **rule, **scoring)
            else:
                part.copy_(_unmask_late(part, logits, mask_id, late, rule, scoring))
    return x


def canvas(model: Any, prompt: Tensor, gen_length: int, mask_id: int) -> Tensor:
    """The prompt and gen_length masks, [B, P + gen_length], where the model is."""
    shape = (prompt.shape[0], prompt.shape[1] + gen_length)
    device = getattr(model, "device", prompt.device)
    x = torch.full(shape, mask_id, dtype=torch.long, device=device)
    x[:, : prompt.shape[1]] = prompt
    return x


def split_steps(gen_length: int, block_length: int, steps: int) -> tuple[int, int]:
    """The number of blocks, and of steps a block."""
    if gen_length % block_length:
        raise ValueError(
            f"gen_length: expected a multiple of block_length = {block_length}, got {gen_length}"
        )
    blocks = gen_length // block_length
    if blocks and steps % blocks:
        raise ValueError(f"steps: expected a multiple of the {blocks} blocks, got {steps}")
    return blocks, steps // max(blocks, 1)


def forward(
    model: Callable[..., Any],
    x: Tensor,
    attention_mask: Tensor | None,
    prompt_index: Tensor | None,
    mask_id: int,
    cfg_scale: float,
) -> Tensor:
    """The model's logits [B, N, V], under classifier-free guidance if there is a prompt_index."""
    if prompt_index is None:
        return model(x, attention_mask=attention_mask).logits
    both = torch.cat([x, x.masked_fill(prompt_index, mask_id)])
    if attention_mask is not None:
        attention_mask = torch.cat([attention_mask, attention_mask])
    logits, free = model(both, attention_mask=attention_mask).logits.chunk(2)
    return free + (cfg_scale + 1) * (logits - free)


def _unmask_late(
    x: Tensor,
    logits: Tensor,
    mask_id: int,
    late: tuple[int, int],
    rule: dict[str, Any],
    scoring: dict[str, Any],
) -> Tensor:
    """``unmask`` with confidences of the law without the ``late`` ids, which score 0 themselves."""
    rows, index = as_rows(logits)
    row_index = torch.where(x == mask_id, index, -1)
    never = [i for i in (*scoring["exclude_ids"], excluded(mask_id, logits)) if i is not None]
    tokens = pydecode.sample_and_score(
        rows, row_index=row_index, **(scoring | {"exclude_ids": never})
    ).tokens
    lse = pydecode.sample_and_score(rows, row_index=row_index, exclude_ids=[*never, *late]).lse
    chosen = logits.gather(-1, tokens.clamp(min=0)[..., None])[..., 0].to(lse.dtype)
    is_late = (tokens == late[0]) | (tokens == late[1])
    confidence = (chosen - lse).exp().masked_fill(is_late, 0.0)
    return pydecode.commit(x, tokens, confidence, mask_id=mask_id, **rule).tokens
