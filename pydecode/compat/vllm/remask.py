"""The remasking of ``vllm-project/dllm-plugin`` (LLaDA2 on vLLM)."""

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pydecode

from ...results import Unmasked


def batched_remask(
    logits: Tensor,
    input_draft: Tensor,
    mask_token_id: int,
    threshold: float | Tensor,
    temperature: float | Tensor = 0.0,
    use_float64: bool = False,
    out: Tensor | None = None,
    *,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills the masked positions of each block that the model is sure of, and always the surest.

    Replaces ``batched_remask`` of ``dllm_plugin/sampling/diffusion_sampler.py`` and
    ``batched_remask_triton`` of ``triton_kernels.py`` (July 2026) on ``pydecode.unmask``: dInfer's
    rule, ``{c >= min(threshold, c_(1) - 1e-5)}``, where c is the probability of the chosen token
    under the untempered logits.

    Args:
        logits: [B, L, V], any float dtype, any L, any strides but the last; read once, not copied.
        input_draft: int64 [B, L].
        threshold, temperature: numbers, 0-d or [B] tensors (no recompilation for a new one).
            temperature 0 takes the argmax, above it a token is drawn from softmax(logits / T).
        use_float64: a precision knob of their Gumbel noise, without effect.
        out: int64 [B, L], takes the new draft and is returned; may be ``input_draft``.
        seed, offset: ours, the keys of the draws; None takes a new seed from torch's generator.

    Returns:
        draft int64 [B, L], all_done bool [B], num_transferred int32 [B].

    Where it differs:
        The mask is never a choice: its logit counts as -inf in the choice and in c. Theirs leaves a
        position masked where the argmax is the mask, and stops for good where all are. A row with a
        NaN, or all -inf, is never filled (theirs writes an arbitrary token).

    Raises:
        ValueError, TypeError: a tensor that does not fit, by the operator's name for it.

    >>> import torch
    >>> logits = torch.zeros(1, 3, 10)
    >>> logits[0, 1, 4], logits[0, 2, 7] = 9.0, 2.0
    >>> batched_remask(logits, torch.tensor([[5, 9, 9]]), mask_token_id=9, threshold=0.9)
    (tensor([[5, 4, 9]]), tensor([False]), tensor([1], dtype=torch.int32))
    """
    if seed is None:
        seed = 0
        if isinstance(temperature, Tensor) or temperature > 0:
            seed = torch.randint(2**62, (), device=logits.device)
    step = pydecode.unmask(
        input_draft,
        logits,
        mask_id=mask_token_id,
        rule="threshold",
        threshold=threshold,
        slack=1e-5,
        temperature=temperature,
        seed=seed,
        offset=offset,
        out=out,
    )
    return step.tokens, step.num_left == 0, step.num_committed


batched_remask_triton = batched_remask


def llada2_remask(
    logits: Tensor, input_draft: Tensor, remasking_config: Mapping[str, Any] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``Llada2DefaultRemaskingPolicy`` for a batch on its device, without its lists and its wait.

    All masked positions with c > threshold if those are at least k, else the k surest, ties to the
    smallest index, on ``pydecode.unmask``.

    Args:
        logits: [B, L, V]. input_draft: int64 [B, L].
        remasking_config: as there: ``commit_confidence_threshold`` (0.9; also a tensor, 0-d or
            [B]), ``mask_token_id`` (156895), ``denoise_steps`` (L), ``denoise_step_index`` (0),
            ``num_transfer`` in place of the schedule, ``grammar_extra_transfer`` (0).

    Returns:
        draft int64 [B, L], all_done bool [B], num_transferred int32 [B].

    Where it differs: as ``batched_remask``. Theirs also counts the mask's probability in c.

    Raises:
        ValueError: num_transfer < 0, denoise_steps < 1; what does not fit.

    >>> import torch
    >>> logits = torch.zeros(1, 3, 10)
    >>> logits[0, 1, 4], logits[0, 2, 7] = 9.0, 2.0
    >>> llada2_remask(
    ...     logits, torch.tensor([[5, 9, 9]]), {"mask_token_id": 9, "num_transfer": 2}
    ... )[0]
    tensor([[5, 4, 7]])
    """
    step = _step(logits, input_draft, remasking_config or {})
    return step.tokens, step.num_left == 0, step.num_committed


def _step(logits: Tensor, input_draft: Tensor, config: Mapping[str, Any]) -> Unmasked:
    done: Unmasked = pydecode.unmask(
        input_draft,
        logits,
        mask_id=int(config.get("mask_token_id", 156895)),
        rule="threshold",
        threshold=config.get("commit_confidence_threshold", 0.9),
        strict=True,
        min_commit=_num_transfer(config, input_draft.shape[-1]),
    )
    return done


class RemaskStepResult(NamedTuple):
    """What ``Llada2DefaultRemaskingPolicy.apply`` returns."""

    committed_token_ids: tuple[int, ...]  # the block once no mask is left, else ()
    next_input_block: tuple[int, ...]  # the block, or all masks once it is committed


class Llada2DefaultRemaskingPolicy:
    """One block's step with lists in and out, as the plugin's policy; it waits for the device.

    Replaces the class of this name in ``dllm_plugin/remasking/llada2_default.py``; the rule and the
    differences are ``llada2_remask``'s. Blocks of any length, not of DRAFT_SIZE only.

    >>> policy, config = Llada2DefaultRemaskingPolicy(), {"mask_token_id": 2}
    >>> policy.apply(input_draft=[0, 2], logits=[[0.0, 0, 0], [1, 9, 1]], remasking_config=config)
    RemaskStepResult(committed_token_ids=(0, 1), next_input_block=(2, 2))
    """

    def apply(
        self,
        *,
        input_draft: Sequence[int],
        logits: Any | None = None,
        remasking_config: Mapping[str, Any] | None = None,
    ) -> RemaskStepResult:
        """logits [L, V], a tensor or nested sequences; the config as in ``llada2_remask``."""
        if logits is None:
            raise ValueError("logits: expected the block's [L, V], got None")
        rows = logits if isinstance(logits, Tensor) else torch.tensor(logits, dtype=torch.float32)
        # torch.tensor takes the host three times as long over a list; an empty one has no memory
        ids = array("q", input_draft)
        draft = torch.frombuffer(ids, dtype=torch.int64) if ids else torch.empty(0).long()
        if not rows.is_cpu:
            draft = draft.to(rows.device)
        config = remasking_config or {}
        tokens = tuple(_step(rows[None], draft[None], config).tokens.tolist()[0])
        mask = int(config.get("mask_token_id", 156895))
        if mask in tokens:
            return RemaskStepResult((), tokens)
        return RemaskStepResult(tokens, (mask,) * len(tokens))


def _num_transfer(config: Mapping[str, Any], length: int) -> int:
    """k: what the config says, or the step's share of the block."""
    extra = max(0, int(config.get("grammar_extra_transfer", 0)))
    if "num_transfer" in config:
        count = int(config["num_transfer"]) + extra
        if count < 0:
            raise ValueError(f"num_transfer: expected at least 0, got {config['num_transfer']}")
        return count
    steps = int(config.get("denoise_steps", length))
    if steps < 1:
        raise ValueError(f"denoise_steps: expected at least 1, got {steps}")
    index = max(0, min(int(config.get("denoise_step_index", 0)), steps - 1))
    return length // steps + (index < length % steps) + extra
