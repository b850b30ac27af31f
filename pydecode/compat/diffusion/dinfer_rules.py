"""dInfer's transfer rules: see ``dinfer``."""

from typing import Any

from torch import Tensor

from .transfer import counts, transfer

NEAR_TIES = 1e-5  # what lies this close to the surest goes with it, under any threshold


def get_transfer_index_threshold(
    logits: Tensor,
    temperature: float,
    mask_index: Tensor,
    x: Tensor,
    mask_id: int,
    threshold: float,
    rm_mask: bool = True,
    use_float64: bool = False,
    *,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """dInfer's proposals, and which to take: {c >= min(threshold, c_(1) - 1e-5)}.

    Replaces ``get_transfer_index_threshold``. logits [B, L, V], mask_index [B, L] bool, x [B, L]
    int64 -> (x0 int64, transfer_index bool), as ``fast_dllm.get_transfer_index``.

    ``rm_mask``: theirs leaves out rows whose argmax is the mask, and takes nothing where all are;
    ours does not let the mask compete, so a step always takes something. False: it competes, as
    theirs. ``use_float64`` changes nothing: confidences are fp32, fp64 for fp64 logits. Other
    keywords are read by neither.
    """
    x0, step = transfer(
        logits,
        mask_index,
        x,
        temperature=temperature,
        remasking="low_confidence",
        mask_id=mask_id if rm_mask else None,
        seed=seed,
        offset=offset,
        rule="threshold",
        threshold=threshold,
        slack=NEAR_TIES,
    )
    return x0, step.committed


def get_transfer_index_hierarchy_fast_v2(
    logits: Tensor,
    temperature: float,
    remasking: str,
    mask_index: Tensor,
    x: Tensor,
    num_transfer_tokens: Tensor | int | None,
    mask_id: int,
    threshold: float | None = None,
    low_threshold: float | None = None,
    *,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
) -> tuple[Tensor, Tensor]:
    """dInfer's hierarchy: the surest of each run of masks if c > low_threshold, all c > threshold.

    Replaces ``get_transfer_index_hierarchy_fast_v2``, which loops over the batch and its runs on
    the host. Arguments and results as ``fast_dllm.get_transfer_index``; thresholds of None are off.
    At least the surest is taken, also where its c is just low_threshold and theirs takes nothing.

    Raises:
        ValueError: a schedule and a threshold. NotImplementedError: any ``remasking`` but
            "low_confidence", as theirs.
    """
    if remasking != "low_confidence":
        raise NotImplementedError(f"remasking: expected 'low_confidence', got {remasking!r}")
    if num_transfer_tokens is None:
        rule = segments(threshold, low_threshold)
    elif threshold is None:
        rule = dict(rule="top_k", k=counts(num_transfer_tokens), min_commit=0)
    else:
        raise ValueError(f"threshold: expected None with num_transfer_tokens, got {threshold}")
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


def segments(threshold: float | None, low_threshold: float | None) -> dict[str, Any]:
    return dict(
        rule="segments",
        threshold=float("inf") if threshold is None else threshold,
        low=-1.0 if low_threshold is None else low_threshold,
    )
