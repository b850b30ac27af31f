"""The rejection sampler of vLLM's model runner V2 (``worker/gpu/spec_decode``)."""

import math

import torch
from torch import Tensor

import pydecode

from ...validation import expect_dim


def rejection_sample(
    target_logits: Tensor,
    draft_logits: Tensor | None,
    draft_sampled: Tensor,
    cu_num_logits: Tensor,
    pos: Tensor,
    idx_mapping: Tensor,
    expanded_idx_mapping: Tensor,
    expanded_local_pos: Tensor,
    temperature: Tensor,
    seed: Tensor,
    num_speculative_steps: int,
    synthetic_conditional_rates: Tensor | None = None,
    use_fp64: bool = False,
    use_block_verification: bool = False,
    *,
    draft_logits_tempered: bool = False,
) -> tuple[Tensor, Tensor]:
    """Verifies a packed batch of drafted chains and samples the correction or bonus.

    Replaces ``rejection_sample`` of ``vllm/v1/worker/gpu/spec_decode/rejection_sampler_utils.py``
    (as of August 2026) on ``pydecode.rejection_sample``. The rows of both models are read where
    they lie, the drafter's from its persistent buffer.

    Args:
        target_logits: [num_logits, V], divided by the temperature and masked already.
        draft_logits: [max_reqs, K, Vd], of the drafter **before** the temperature, any strides but
            the last; None: deterministic drafts. Of V and Vd the smaller is the vocabulary, what
            is above it is padding, as in theirs.
        draft_sampled: [num_logits], a request's slot 0 is its last token, slot i+1 its draft i; a
            draft of -1 ends the chain.
        cu_num_logits: [R+1], exclusive sums. A request has one row more than drafts.
        pos: [num_logits], the position of each slot's token; that of the first draft is one more
            than its request's first, and keys its draws.
        idx_mapping: [R], each request's place in the persistent tensors.
        expanded_idx_mapping, expanded_local_pos: say the same again, and are not read.
        temperature, seed: [max_reqs]; temperature 0 is greedy.
        num_speculative_steps: K.
        synthetic_conditional_rates: not served.
        use_fp64: a performance knob of their Gumbel sampler, without effect.
        use_block_verification: ``rule="block"``, else "token".
        draft_logits_tempered: ours. True where the buffer holds logits after the temperature, as it
            did before vLLM cached them untouched; then q is their plain softmax.

    Returns:
        sampled int64 [R, K+1], num_sampled int32 [R].

    Where it differs:
        ``sampled`` is -1 past num_sampled, where theirs is uninitialised. Drafting, accepting and
        resampling have streams of their own (theirs share a key, vllm#47386). After a draft of -1
        the token comes from the target's law, with draft logits too. A row with a NaN gives that
        request num_sampled 0. The draws differ; a request's depend on its seed and position alone.

    Raises:
        NotImplementedError: synthetic_conditional_rates.
        ValueError, TypeError: a tensor that does not fit, by the operator's name for it.

    >>> import torch
    >>> one = torch.tensor([0])
    >>> rejection_sample(
    ...     torch.eye(5)[[3, 1, 4]], None, torch.tensor([0, 3, 2]), torch.tensor([0, 3]),
    ...     torch.tensor([7, 8, 9]), one, one.expand(3), torch.arange(3), torch.zeros(1), one, 3
    ... )
    (tensor([[ 3,  1, -1, -1]]), tensor([2], dtype=torch.int32))
    """
    if synthetic_conditional_rates is not None:
        raise NotImplementedError("synthetic_conditional_rates: expected None")
    G, last = num_speculative_steps, draft_sampled.shape[0] - 1
    first, end = cu_num_logits[:-1], cu_num_logits[1:]
    i = torch.arange(G + 1, device=target_logits.device)
    row = first[:, None] + i
    place = idx_mapping.clamp(0, temperature.shape[0] - 1)
    t = temperature.index_select(0, place)
    draft_rows = draft_row_index = None
    if draft_logits is not None:
        expect_dim("draft_logits", draft_logits, 3, "[max_reqs, K, V]")
        vocab = min(target_logits.shape[-1], draft_logits.shape[-1])
        target_logits = target_logits[:, :vocab]
        draft_rows, per_request, per_step = _flat(draft_logits[..., :vocab])
        draft_row_index = torch.add(i[:G] * per_step, idx_mapping[:, None], alpha=per_request)
    verified = pydecode.rejection_sample(
        target_logits,
        draft_sampled[row[:, 1:].clamp(0, last)],
        draft_rows,
        num_drafts=cu_num_logits.diff() - 1,
        row_index=torch.where(row < end[:, None], row, -1),
        draft_row_index=draft_row_index,
        temperature=(t > 0).float(),
        draft_temperature=1.0 if draft_logits_tempered else t,
        rule="block" if use_block_verification else "token",
        seed=seed.index_select(0, place),
        positions=pos.index_select(0, first.clamp(0, last)) + 1,
    )
    return verified.tokens, (verified.tokens >= 0).sum(-1, dtype=torch.int32)


def _flat(x: Tensor) -> tuple[Tensor, int, int]:
    """[R, K, V] as rows [n, V] without a copy; row (r, k) is at r * first + k * second."""
    R, K, V = x.shape
    unit = math.gcd(x.stride(0), x.stride(1)) or 1
    first, second = x.stride(0) // unit, x.stride(1) // unit
    rows = (R - 1) * first + (K - 1) * second + 1 if R and K else 0
    return x.as_strided((rows, V), (unit, 1)), first, second
