"""vLLM V1's rejection sampler (``vllm/v1/sample/rejection_sampler.py``)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import pydecode

PLACEHOLDER_TOKEN_ID = -1


def rejection_sample(
    draft_token_ids: Tensor,
    num_draft_tokens: Sequence[int],
    max_spec_len: int,
    cu_num_draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_logits: Tensor,
    bonus_token_ids: Tensor,
    sampling_metadata: Any,
    synthetic_mode: bool = False,
    synthetic_conditional_rates: Tensor | None = None,
    use_fp64_gumbel: bool = False,
) -> Tensor:
    """Verifies a packed batch of drafted chains; the bonus tokens come from the caller.

    Replaces ``vllm.v1.sample.rejection_sampler.rejection_sample`` (as of August 2026; since #32852
    the sixth argument is logits, before it was probabilities) on ``pydecode.rejection_sample``.
    The packed rows are read where they lie, and no probabilities are written.

    Args:
        draft_token_ids: int32/int64 [N], the requests' drafts one after the other; -1: no token.
        num_draft_tokens: how many each request has, on the host. Read for requests with a generator
            of their own only; ``cu_num_draft_tokens`` counts.
        max_spec_len: G, the longest chain, the output's width less one; any number.
        cu_num_draft_tokens: int32/int64 [B], inclusive sums.
        draft_probs: [N, V], the law that each draft was drawn from; None: deterministic drafts.
        target_logits: [N, V], divided by the temperature and masked already; any strides but the
            last, fp16 or bf16 too.
        bonus_token_ids: [B, 1], emitted after a chain that was accepted whole.
        sampling_metadata: anything with ``all_greedy``, ``all_random``, ``temperature`` ([B], 0 or
            less is greedy; None if all are), ``generators`` ({request: torch.Generator}).
        synthetic_mode, synthetic_conditional_rates: not served.
        use_fp64_gumbel: a performance knob of their Gumbel sampler, without effect.

    Returns:
        int32 [B, G+1]: accepted drafts, then the correction or the bonus, then -1.

    Where it differs:
        A draw of exactly 0 accepts no token that the target forbids. After a draft of -1 the token
        comes from the target's law itself, not from a residual of a draft that never was. A row
        with a NaN, or with everything masked, gives that request no token at all (all -1, which
        ``parse_output`` makes an empty list) in place of token 0. The draws differ: uniforms in
        float64 from torch's generator, or the request's own, which gives num_draft_tokens + 1
        numbers, so that a seeded request does not depend on its batch; none if all are greedy.

    Raises:
        NotImplementedError: synthetic_mode or synthetic_conditional_rates.
        ValueError, TypeError: a tensor that does not fit, by the operator's name for it.

    >>> from types import SimpleNamespace
    >>> import torch
    >>> greedy = SimpleNamespace(all_greedy=True, all_random=False, temperature=None, generators={})
    >>> logits = torch.eye(5)[[3, 1, 4]]  # the target wants 3, 1 and, for the second request, 4
    >>> rejection_sample(
    ...     torch.tensor([3, 2, 4]), [2, 1], 2, torch.tensor([2, 3]), None, logits,
    ...     torch.tensor([[0], [2]]), greedy,
    ... )
    tensor([[ 3,  1, -1],
            [ 4,  2, -1]], dtype=torch.int32)
    """
    if synthetic_mode or synthetic_conditional_rates is not None:
        name = "synthetic_mode" if synthetic_mode else "synthetic_conditional_rates"
        raise NotImplementedError(f"{name}: expected off, there is no synthetic acceptance here")
    B, N, device = cu_num_draft_tokens.shape[0], draft_token_ids.shape[0], target_logits.device
    first = torch.nn.functional.pad(cu_num_draft_tokens, (1, 0))[:-1]
    row = first[:, None] + torch.arange(max_spec_len + 1, device=device)
    row = torch.where(row < cu_num_draft_tokens[:, None], row, -1)  # none for the bonus
    drafted = row[:, :max_spec_len]
    drafts = draft_token_ids[drafted.clamp(0, N - 1)] if N else drafted
    num_drafts = cu_num_draft_tokens - first
    uniforms = None
    if sampling_metadata.all_greedy or sampling_metadata.all_random:
        temperature: Any = 0.0 if sampling_metadata.all_greedy else 1.0
    else:
        temperature = (sampling_metadata.temperature > 0).float()
    if not sampling_metadata.all_greedy:
        uniforms = torch.rand(B, max_spec_len + 1, dtype=torch.float64, device=device)
        for request, generator in sampling_metadata.generators.items():
            count = num_draft_tokens[request]
            if count > 0:  # as theirs: else a seeded request's draws would depend on its schedule
                uniforms[request, :count].uniform_(generator=generator)
                uniforms[request, -1:].uniform_(generator=generator)
    verified = pydecode.rejection_sample(
        target_logits,
        drafts,
        draft_probs=draft_probs,
        num_drafts=num_drafts,
        row_index=row,
        draft_row_index=None if draft_probs is None else drafted,
        temperature=temperature,
        uniforms=uniforms,
    )
    # the path reaches its request's count iff every draft was accepted
    whole = verified.path == num_drafts[:, None]
    return torch.where(whole, bonus_token_ids.view(B, 1), verified.tokens).int()


def parse_output(output_token_ids: Tensor, vocab_size: int) -> list[list[int]]:
    """The emitted tokens of each request, on the host (so it waits for the device, as theirs).

    Replaces ``RejectionSampler.parse_output`` in its oldest form: a placeholder or an id past the
    vocabulary is dropped.

    >>> import torch
    >>> parse_output(torch.tensor([[3, 1, -1], [-1, -1, -1]]), vocab_size=5)
    [[3, 1], []]
    """
    rows = output_token_ids.tolist()
    return [[x for x in row if x != PLACEHOLDER_TOKEN_ID and x < vocab_size] for row in rows]
