"""Fast-dLLM's transfer rules: see ``fast_dllm``."""

from typing import Any

import torch
from torch import Tensor

from .transfer import counts, transfer

ONE = torch.ones((), dtype=torch.int32)  # comparing with it costs the host less than with a number


def get_transfer_index(
    logits: Tensor,
    temperature: float,
    remasking: str,
    mask_index: Tensor,
    x: Tensor,
    num_transfer_tokens: Tensor | int | None,
    threshold: float | None = None,
    *,
    mask_id: int | None = 126336,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
) -> tuple[Tensor, Tensor]:
    """Fast-dLLM's proposals, and which of them to take: the k surest, or those over a threshold.

    Replaces ``get_transfer_index`` of Fast-dLLM, dParallel and dInfer, which makes an fp64 softmax
    of all rows and reads the device once a candidate.

    Args:
        logits: [B, L, V], any strides but the last; only rows in ``mask_index`` are read.
        mask_index: [B, L] bool. x: [B, L] int64.
        num_transfer_tokens: k, [B] or int (0 takes nothing); not read under a threshold.
        threshold: takes {c >= threshold} and always the surest one.
        mask_id: never proposed; None: theirs, where it can be, and their loops hang.
        seed, offset: see ``pydecode.compat.diffusion``.

    Returns:
        (x0 [B, L] int64: proposals where mask_index, x elsewhere; transfer_index [B, L] bool).

    Where k exceeds the masked rows, theirs marks others too, where x0 is x: to no effect. A row
    with NaN is never taken.

    Raises:
        NotImplementedError: an unknown ``remasking``. ValueError, TypeError: tensors that do not
            fit; neither ``num_transfer_tokens`` nor a threshold.
    """
    if threshold is None:
        rule = dict(rule="top_k", k=counts(num_transfer_tokens), min_commit=0)
    else:
        rule = dict(rule="threshold", threshold=threshold)
    x0, step = transfer(
        logits,
        mask_index,
        x,
        temperature=temperature,
        remasking=remasking,
        mask_id=mask_id,
        seed=seed,
        offset=offset,
        **rule,
    )
    return x0, step.committed


def get_transfer_index_dynamic(
    logits: Tensor,
    temperature: float,
    remasking: str,
    mask_index: Tensor,
    x: Tensor,
    num_transfer_tokens: Any,
    factor: float = 1,
    *,
    bug_compatible: bool = False,
    mask_id: int | None = 126336,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
) -> tuple[Tensor, Tensor]:
    """Fast-dLLM's factor rule: all before the first n >= 2 with c_(n) < 1 - factor / (n + 1).

    Replaces ``get_transfer_index_dynamic``, also dInfer's; arguments and results as
    ``get_transfer_index``. ``num_transfer_tokens`` is read by neither.

    Theirs departs from the paper's rule (Wu et al., 2025, section 3.3) where only the last of
    several candidates fails: it is taken all the same, so two masks always go together.
    ``bug_compatible`` does so too. A request with no masks left is an IndexError there.
    """
    x0, step = transfer(
        logits,
        mask_index,
        x,
        temperature=temperature,
        remasking=remasking,
        mask_id=mask_id,
        seed=seed,
        offset=offset,
        rule="factor",
        factor=factor,
    )
    if bug_compatible:
        alone = step.num_left.eq(ONE).unsqueeze(1)
        return x0, torch.where(alone, mask_index, step.committed)
    return x0, step.committed
