"""SGLang's post-processing of a diffusion language model's step (``sglang/srt/dllm``)."""

from torch import Tensor

import pydecode


def dllm_post_process_fused(
    logits: Tensor,
    input_ids: Tensor,
    mask_id: int,
    threshold: float | Tensor,
    autotune: bool = True,
) -> None:
    """Fills, in place, the masked positions whose token has p > threshold, or else the surest one.

    Replaces ``dllm_post_process_fused`` of ``sglang/srt/dllm/kernels/post_process.py`` (#18810; in
    its later revision ``calculate_low_confidence_score``), and with it the step of LowConfidence
    (threshold 0.95) and the unmasking of JointThreshold (0.5; its edits of filled positions are not
    here), on ``pydecode.unmask``.

    Args:
        logits: [L, V], or (ours) [B, L, V]: all requests in one call; any float dtype, any L, any
            strides but the last.
        input_ids: int64 [L], or [B, L] (a view of the flat ids), changed in place.
        mask_id: an int. It is never a choice.
        threshold: a number, or a 0-d or [B] tensor; a new one compiles nothing.
        autotune: a performance knob, without effect.

    Where it differs:
        The mask's logit counts as -inf, in the choice and in p: where the argmax is the mask,
        theirs writes the mask again and loops for good. A vocabulary whose first tile is all -inf
        (a grammar's mask) gives them NaN, here the right p. A row with a NaN or all -inf is never
        filled. Ties go to the first position. One launch for the batch, in place of two a request.

    Raises:
        ValueError, TypeError: a tensor that does not fit, by the operator's name for it.

    >>> import torch
    >>> ids, logits = torch.tensor([5, 9, 9]), torch.zeros(3, 10)
    >>> logits[1, 4], logits[2, 7] = 9.0, 2.0
    >>> dllm_post_process_fused(logits, ids, mask_id=9, threshold=0.95)
    >>> ids
    tensor([5, 4, 9])
    """
    if logits.dim() == 2:
        logits, input_ids = logits[None], input_ids[None]
    pydecode.unmask(
        input_ids,
        logits,
        mask_id=mask_id,
        rule="threshold",
        threshold=threshold,
        strict=True,
        out=input_ids,
    )


dllm_post_process = dllm_post_process_fused
calculate_low_confidence_score = dllm_post_process_fused
