"""One step of unmasking: masked rows of a window are sampled and scored, and a rule commits some.

LLaDA (Nie et al., 2025, section 2.4), Fast-dLLM (Wu et al., 2025, section 3.3).
"""

import torch
from torch import Tensor

from .. import philox
from .commit_rules import Rule, commits, read_rule
from .numbers import per_request
from .row_sampling import read_sampling, row_uniform, sample_rows

Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Proposed = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def unmask(
    tokens: Tensor,
    logits: Tensor,
    mask_id: int,
    masked: Tensor | None,
    shift: int,
    window_start: int,
    window_start_tensor: Tensor | None,
    window_length: int,
    external_score: Tensor | None,
    rule: str,
    k: int,
    k_tensor: Tensor | None,
    threshold: float,
    threshold_tensor: Tensor | None,
    slack: float,
    slack_tensor: Tensor | None,
    factor: float,
    factor_tensor: Tensor | None,
    low: float,
    low_tensor: Tensor | None,
    keep: float,
    keep_tensor: Tensor | None,
    strict: bool,
    min_commit: int,
    max_commit: int,
    temperature: float,
    temperature_tensor: Tensor | None,
    top_k: int,
    top_k_tensor: Tensor | None,
    top_p: float,
    top_p_tensor: Tensor | None,
    min_p: float,
    min_p_tensor: Tensor | None,
    filter_order: str,
    confidence: str,
    tempered: bool,
    exclude_ids: list[int],
    exclude_ids_tensor: Tensor | None,
    bias_ids: Tensor | None,
    bias: Tensor | None,
    allowed: Tensor | None,
    sampler: str,
    seed: int,
    seed_tensor: Tensor | None,
    offset: int,
    offset_tensor: Tensor | None,
    positions: Tensor | None,
    uniforms: Tensor | None,
    return_proposals: bool,
) -> Proposed:
    """tokens [B, L], logits [B, L|length|length+1, V] -> tokens, committed, counts, confidence,
    proposals."""
    B, L = tokens.shape
    start = per_request(window_start, window_start_tensor, B, tokens, torch.int64)[:, None]
    if window_length < 0:
        window_length = L
    sampling = read_sampling(
        *(temperature, temperature_tensor, top_k, top_k_tensor),
        *(top_p, top_p_tensor, min_p, min_p_tensor),
        filter_order,
        "neg_entropy" if rule in ("entropy", "entropy_bound") else confidence,
        *(tempered, [*exclude_ids, mask_id], exclude_ids_tensor, sampler),
        *(seed, seed_tensor, offset, offset_tensor),
        batch=B,
        like=logits,
    )

    # the window's positions, and the row that each is read from
    if window_length < L:
        at = start + torch.arange(window_length, device=tokens.device)
    else:
        at = torch.arange(L, device=tokens.device).expand(B, L)
    row = row_of(at, start, logits.shape[1], L, window_length, shift)
    inside = (at >= 0) & (at < L)
    at_safe = at.clamp(0, max(L - 1, 0))
    b = torch.arange(B, device=tokens.device)[:, None]
    scored = sample_rows(
        logits[b, row],
        at if positions is None else positions[b, at_safe],
        None if bias_ids is None else bias_ids[b, row],
        None if bias is None else bias[b, row],
        None if allowed is None else allowed[b, at_safe],
        None if uniforms is None else uniforms[b, at_safe],
        sampling,
    )

    # back to [B, L]; a column L takes what lies outside
    to = torch.where(inside, at, L)
    scores = torch.where(scored.good, scored.confidence, torch.nan)
    scores = scores.new_full((B, L + 1), torch.nan).scatter(-1, to, scores)[:, :L]
    proposals = tokens.new_full((B, L + 1), -1).scatter(-1, to, scored.tokens)[:, :L]

    coins = None
    if rule == "posterior":
        position = torch.arange(L, device=tokens.device) if positions is None else positions
        coins = row_uniform(philox.COMMIT, sampling.seed, sampling.offset, position.expand(B, L))
    committing = read_rule(
        *(rule, k, k_tensor, threshold, threshold_tensor, slack, slack_tensor),
        *(factor, factor_tensor, low, low_tensor, keep, keep_tensor),
        *(strict, min_commit, max_commit),
        like=external_score if rule == "external" and external_score is not None else scores,
    )
    read = (tokens == mask_id) if masked is None else masked
    read = read & in_window(tokens, start, window_length)
    result = step(tokens, proposals, scores, read, committing, external_score, coins)
    if not return_proposals:
        return (*result, tokens.new_empty(0))
    proposed = read & (proposals >= 0)
    return (*result, torch.where(proposed, proposals, tokens).contiguous())


def row_of(
    at: Tensor, start: Tensor, num_rows: int, L: int, window_length: int, shift: int
) -> Tensor:
    """The row of logits [B, num_rows, V] that position ``at`` [B, W] takes its token from."""
    if num_rows == L:  # the whole, whatever the window
        row = at - shift
    elif num_rows == window_length:  # the first position takes its own first row
        row = at - start - shift
    else:  # window_length + 1: starts one earlier, so the shift is in it
        row = at - start
    return row.clamp(0, max(num_rows - 1, 0))


def in_window(tokens: Tensor, start: Tensor, length: int) -> Tensor:
    """bool [B, L] of start [B, 1]; length -1: everything."""
    at = torch.arange(tokens.shape[1], device=tokens.device)
    if length < 0:
        length = tokens.shape[1]
    return (at >= start) & (at < start + length)


def step(
    tokens: Tensor,
    proposals: Tensor,
    scores: Tensor,
    masked: Tensor,
    rule: Rule,
    external: Tensor | None,
    uniforms: Tensor | None,
) -> Result:
    """Commits what the rule says of the masked; a NaN score [B, L] is never committed."""
    tokens = tokens.contiguous()  # results are contiguous, whatever the strides of the arguments
    masked = masked.contiguous()
    committed = commits(rule, scores, masked, external, uniforms)
    result = torch.where(committed, proposals.long(), tokens)
    return (
        result.contiguous(),
        committed.contiguous(),
        committed.sum(-1, dtype=torch.int32),
        (masked & ~committed).sum(-1, dtype=torch.int32),
        torch.where(masked & ~scores.isnan(), scores, -torch.inf).contiguous(),
    )
