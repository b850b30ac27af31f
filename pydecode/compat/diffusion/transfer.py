"""What the peers' transfer functions share: one ``unmask``, its draws, rows without a copy."""

import math
from typing import Any

import torch
from torch import Tensor

import pydecode

from ...results import Unmasked
from ...validation import expect_dtype

NO_MASK = -1  # outside every vocabulary, so that no proposal is refused on its account


def transfer(
    logits: Tensor,
    mask_index: Tensor,
    x: Tensor,
    *,
    temperature: float,
    remasking: str,
    mask_id: int | None,
    seed: int | Tensor | None,
    offset: int | Tensor,
    confidence: str = "probability",
    **rule: Any,
) -> tuple[Tensor, Unmasked]:
    """x0 [B, L] of logits [B, L, V], and the step: masked rows are read, and a rule picks some.

    x0 is the proposal of every row in ``mask_index`` and x elsewhere. ``rule``: of ``unmask``.
    """
    if logits.dim() != 3 or not mask_index.shape == x.shape == logits.shape[:2]:
        raise ValueError(
            f"logits, mask_index, x: expected [B, L, V], [B, L] and [B, L], got "
            f"{list(logits.shape)}, {list(mask_index.shape)} and {list(x.shape)}"
        )
    expect_dtype("mask_index", mask_index, (torch.bool,))
    step, x0 = pydecode.unmask(
        x,
        logits,
        mask_id=NO_MASK if mask_id is None else mask_id,
        masked=mask_index,
        return_proposals=True,
        temperature=temperature,
        confidence=confidence_of(remasking, confidence),
        **draws(temperature, remasking, seed, offset, x),
        **rule,
    )
    return x0, step


def as_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, L, V] of any strides but the last as rows [R, V] of the same memory, and the row
    of each (b, i), int64 [B, L].
    """
    B, L, V = logits.shape
    at = torch.arange(B * L, device=logits.device).view(B, L)
    batch, step = logits.stride(0), logits.stride(1)
    if B <= 1 or L == 0 or batch == L * step:
        return logits.as_strided((B * L, V), (step, 1)), at
    row = math.gcd(batch, step) or V  # both are 0 where one row stands for all
    last = ((B - 1) * batch + (L - 1) * step) // row
    b = torch.arange(B, device=logits.device)[:, None]
    i = torch.arange(L, device=logits.device)
    return logits.as_strided((last + 1, V), (row, 1)), b * (batch // row) + i * (step // row)


def draws(temperature: float, remasking: str, seed: Any, offset: Any, x: Tensor) -> dict[str, Any]:
    """Seed and offset; without a seed one from torch's generator, where anything is drawn."""
    if seed is not None:
        return {"seed": seed, "offset": offset}
    if remasking != "random" and temperature == 0:
        return {}
    return {"seed": new_seed(x.shape[0], x.device)}


def new_seed(batch: int, device: torch.device) -> Tensor:
    """[B] int64 from torch's generator of the device, which nobody reads."""
    return torch.randint(2**63 - 1, (batch,), device=device)


def confidence_of(remasking: str, otherwise: str = "probability") -> str:
    """The op's ``confidence`` for LLaDA's ``remasking``."""
    if remasking == "low_confidence":
        return otherwise
    if remasking == "random":
        return "random"
    raise NotImplementedError(
        f"remasking: expected 'low_confidence' or 'random', got {remasking!r}"
    )


def excluded(mask_id: int | None, logits: Tensor) -> int | None:
    """``exclude_ids``: the mask, unless it lies outside the vocabulary."""
    return mask_id if mask_id is not None and 0 <= mask_id < logits.shape[-1] else None


def counts(num_transfer_tokens: Any) -> Any:
    """A schedule's column as ``k``: an int, 0-d or [B]; peers hand [B] or [B, 1]."""
    if num_transfer_tokens is None:
        raise TypeError(
            "num_transfer_tokens: expected numbers where there is no threshold, got None"
        )
    if isinstance(num_transfer_tokens, Tensor) and num_transfer_tokens.dim() > 1:
        return num_transfer_tokens.flatten()
    return num_transfer_tokens
