"""Which masked rows a step commits: the ten rules of ``unmask`` and ``commit`` (DESIGN section 4).

Each rule is an order of the rows that may be committed and a set of them. At least min_commit and
at most max_commit are committed: the set is filled and cut in the rule's own order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .numbers import compute_dtype, per_request

BY_POSITION = ("prefix", "sequential", "posterior")


class Rule(NamedTuple):
    """A rule and its numbers, one a request [B, 1]."""

    name: str
    k: Tensor
    threshold: Tensor
    slack: Tensor
    factor: Tensor
    low: Tensor
    keep: Tensor
    strict: bool
    min_commit: int
    max_commit: int  # -1: no limit


def read_rule(
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
    *,
    like: Tensor,
) -> Rule:
    """The schema's pairs, in the dtype of the scores ``like`` [B, L] that they are held against."""

    def read(number: float, tensor: Tensor | None, dtype: torch.dtype) -> Tensor:
        return per_request(number, tensor, like.shape[0], like, dtype)[:, None]

    dtype = compute_dtype(like.dtype)
    return Rule(
        rule,
        read(k, k_tensor, torch.int64),
        read(threshold, threshold_tensor, dtype),
        read(slack, slack_tensor, dtype),
        read(factor, factor_tensor, dtype),
        read(low, low_tensor, dtype),
        read(keep, keep_tensor, dtype),
        strict,
        min_commit,
        max_commit,
    )


def commits(
    rule: Rule,
    scores: Tensor,
    masked: Tensor,
    external: Tensor | None = None,
    uniforms: Tensor | None = None,
) -> Tensor:
    """Scores [B, L] of masked rows (bool [B, L], inside the window) -> committed rows, bool [B, L].

    A NaN score stands for a masked row that cannot be committed (a NaN row, no proposal): it is in
    no order, ends a prefix, and belongs to its run of masked rows. ``scores`` are -H for the
    entropy rules. ``external`` [B, L] for the external rule, ``uniforms`` [B, L] for posterior.
    """
    eligible = masked & ~scores.isnan()
    key = scores
    if rule.name == "external":
        assert external is not None
        eligible = eligible & ~external.isnan()
        key = external
    elif rule.name in BY_POSITION:
        key = torch.zeros_like(scores)
    order = best_first(key, eligible)

    # from here on column n - 1 is the n-th row of the rule's order
    n = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    may = eligible.gather(-1, order)
    c = scores.gather(-1, order).masked_fill(~may, -torch.inf)

    if rule.name in ("top_k", "sequential"):
        chosen = n <= rule.k
    elif rule.name == "threshold":
        clamped = torch.minimum(rule.threshold, c[:, :1] - rule.slack)
        chosen = reaches(c, torch.where(rule.slack > 0, clamped, rule.threshold), rule.strict)
    elif rule.name == "factor":
        fails = (n >= 2) & (c < 1 - rule.factor / (n + 1))
        chosen = fails.cumsum(-1) == 0
    elif rule.name == "entropy":
        chosen = reaches(c, -rule.threshold, rule.strict)
    elif rule.name == "entropy_bound":
        entropy = -c.masked_fill(~may, 0)
        earlier = entropy.cumsum(-1).roll(1, -1).masked_fill(n == 1, 0)
        chosen = reaches(-earlier, -rule.threshold, rule.strict)
    elif rule.name == "prefix":
        fails = masked & ~reaches(scores, rule.threshold, rule.strict)
        chosen = (fails.cumsum(-1) == 0).gather(-1, order)
    elif rule.name == "segments":
        best = best_of_runs(masked, order, may).gather(-1, order)
        chosen = (best & (c > rule.low)) | (c > rule.threshold)
    elif rule.name == "posterior":
        assert uniforms is not None
        chosen = (uniforms >= rule.keep).gather(-1, order)
    else:
        assert rule.name == "external", rule.name
        assert external is not None
        chosen = external.gather(-1, order) > rule.threshold

    chosen = chosen & may
    rest = may & ~chosen
    missing = rule.min_commit - chosen.sum(-1, keepdim=True)
    filled = rest & (rest.cumsum(-1) <= missing)
    if rule.max_commit >= 0:
        chosen = chosen & (chosen.cumsum(-1) <= rule.max_commit)
    return torch.zeros_like(masked).scatter(-1, order, chosen | filled)


def best_first(key: Tensor, eligible: Tensor) -> Tensor:
    """Columns [B, L] by descending key, ties to the lowest position; ineligible ones come last."""
    # two stable sorts, since an eligible row's key may be -inf
    by_key = key.masked_fill(~eligible, 0).sort(dim=-1, descending=True, stable=True).indices
    late = (~eligible).to(torch.uint8).gather(-1, by_key)
    return by_key.gather(-1, late.sort(dim=-1, stable=True).indices)


def reaches(c: Tensor, threshold: Tensor, strict: bool) -> Tensor:
    """c >= threshold, or > if strict; NaN reaches nothing."""
    return c > threshold if strict else c >= threshold


def best_of_runs(masked: Tensor, order: Tensor, may: Tensor) -> Tensor:
    """The first row in ``order`` of each maximal run of adjacent masked rows, bool [B, L]."""
    L = masked.shape[1]
    before = torch.nn.functional.pad(masked, (1, 0))[:, :L]
    run = (masked & ~before).cumsum(-1)  # 1, 2, .. inside runs
    rank = torch.where(may, torch.arange(L, device=masked.device), L)
    rank = torch.full_like(order, L).scatter(-1, order, rank)
    first = order.new_full((order.shape[0], L + 1), L)
    first = first.scatter_reduce(-1, run, torch.where(masked, rank, L), "amin")
    return masked & (rank < L) & (rank == first.gather(-1, run))
