"""The commit rules alone, for tokens and scores that the caller has already."""

import torch
from torch import Tensor

from .. import philox
from .commit_rules import read_rule
from .numbers import compute_dtype, per_request
from .row_sampling import row_uniform
from .unmask import Result, in_window, step


def commit(
    tokens: Tensor,
    proposals: Tensor,
    scores: Tensor,
    mask_id: int,
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
    seed: int,
    seed_tensor: Tensor | None,
    offset: int,
    offset_tensor: Tensor | None,
    positions: Tensor | None,
    uniforms: Tensor | None,
) -> Result:
    """tokens, proposals, scores [B, L] -> tokens, committed, counts, confidence."""
    B, L = tokens.shape
    start = per_request(window_start, window_start_tensor, B, tokens, torch.int64)[:, None]
    scores = scores.to(compute_dtype(scores.dtype))
    real = (proposals >= 0) & (proposals != mask_id)
    scores = torch.where(real, scores, torch.nan)
    if rule == "posterior" and uniforms is None:
        position = torch.arange(L, device=tokens.device) if positions is None else positions
        uniforms = row_uniform(
            philox.COMMIT,
            philox.request_keys(seed, seed_tensor, B, tokens.device),
            per_request(offset, offset_tensor, B, tokens, torch.int64),
            position.expand(B, L),
        )
    committing = read_rule(
        *(rule, k, k_tensor, threshold, threshold_tensor, slack, slack_tensor),
        *(factor, factor_tensor, low, low_tensor, keep, keep_tensor),
        *(strict, min_commit, max_commit),
        like=external_score if rule == "external" and external_score is not None else scores,
    )
    masked = (tokens == mask_id) & in_window(tokens, start, window_length)
    return step(tokens, proposals, scores, masked, committing, external_score, uniforms)
