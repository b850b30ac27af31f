"""The ten commit rules for one request a program: shared by ``commit`` and ``unmask``."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .commit_orders import (
    ALL,
    CHANGED,
    CHOSEN,
    ENTROPY,
    ENTROPY_BOUND,
    FACTOR,
    FAR,
    MASKED,
    NAMES,
    POSTERIOR,
    PREFIX,
    REST,
    SEGMENTS,
    SEQUENTIAL,
    TAKEN,
    THRESHOLD,
    TOP_K,
    Rule,
    among,
    best_of_runs,
    clipped_window,
    find_runs,
    precedes,
    ranks,
    reaches,
    sums_ahead,
    tile,
)
from .philox import COMMIT, uniform
from .rows import offset_of, position_of, seed_of, stride0, two
from .vocabulary import INFINITY, as_scalar, number, plain


@triton.jit
def commit_window(
    place,
    rule,
    keys,
    results,
    b,
    RULE: tl.constexpr,
    STRICT: tl.constexpr,
    PER_REQUEST: tl.constexpr,
    PROPOSED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Chooses, fills and cuts, and writes the results of request b, whose flags MASKED and scores
    are already in ``committed`` and ``confidence``, all over the window."""
    low, high = clipped_window(place, b)
    k = as_scalar(number(rule.k >> 2, rule.k_of, rule.stride_k, b), tl.int64)
    threshold = number(rule.threshold, rule.threshold_of, rule.stride_threshold, b)
    threshold = as_scalar(threshold, tl.float32)
    if RULE == ENTROPY or RULE == ENTROPY_BOUND:  # noqa: SIM109
        threshold = -threshold

    # what must be known of the whole window before any row is chosen
    edge, edge_key = tl.full([], FAR, tl.int32), tl.full([], float("-inf"), tl.float32)
    if RULE == THRESHOLD and rule.slack is not None:
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(low, high, BLOCK):
            at = start + tl.arange(0, BLOCK)
            _, score, _, may = tile(results, rule, place, b, at, high, RULE)
            best = tl.maximum(best, tl.where(may, score, -INFINITY))
        slack = as_scalar(number(rule.slack, rule.slack_of, rule.stride_slack, b), tl.float32)
        near = tl.max(best, 0) - slack
        near = tl.minimum(threshold, near, propagate_nan=tl.PropagateNan.ALL)
        threshold = tl.where(slack > 0, near, threshold)
    if RULE == PREFIX:
        for start in range(low, high, BLOCK):
            at = start + tl.arange(0, BLOCK)
            flags, score, _, _ = tile(results, rule, place, b, at, high, RULE)
            reached = tl.where(reaches(score, threshold, STRICT), 1, 0)
            fails = (flags & MASKED) > reached
            edge = tl.minimum(edge, tl.min(tl.where(fails, at, FAR), 0))
    if RULE == FACTOR:
        lowest = tl.full([], FAR, tl.int32)
        factor = as_scalar(number(rule.factor, rule.factor_of, rule.stride_factor, b), tl.float32)
        for start in range(low, high, BLOCK):
            at = start + tl.arange(0, BLOCK)
            _, score, key, may = tile(results, rule, place, b, at, high, RULE)
            rank = ranks(results, rule, place, b, at, key, may, 0, low, high, ALL, RULE, BLOCK)
            needed = 1.0 - tl.div_rn(
                factor + tl.zeros([BLOCK], tl.float32), (rank + 2).to(tl.float32)
            )
            fails = may & (rank >= 1) & (score < needed)
            first = tl.min(tl.where(fails, rank, FAR), 0)
            if first < lowest:
                lowest = first
                here = fails & (rank == first)
                edge = tl.min(tl.where(here, at, FAR), 0)
                edge_key = tl.max(tl.where(here, key, -INFINITY), 0)
    if RULE == SEGMENTS:
        find_runs(results, place, b, low, high, BLOCK)

    # the rule's own choice
    count = tl.zeros([], tl.int32)
    before = tl.zeros([], tl.int32)
    for start in range(low, high, BLOCK):
        at = start + tl.arange(0, BLOCK)
        flags, score, key, may = tile(results, rule, place, b, at, high, RULE)
        if RULE == TOP_K or RULE == SEQUENTIAL:  # noqa: SIM109
            chosen = (
                ranks(results, rule, place, b, at, key, may, before, low, high, ALL, RULE, BLOCK)
                < k
            )
        elif RULE == THRESHOLD or RULE == ENTROPY:  # noqa: SIM109
            chosen = reaches(score, threshold, STRICT)
        elif RULE == FACTOR:
            chosen = precedes(key, at, edge_key, edge)
            chosen = tl.where(edge + 0 * at == FAR, may, chosen)
        elif RULE == ENTROPY_BOUND:
            ahead = sums_ahead(results, rule, place, b, at, key, low, high, RULE, BLOCK)
            chosen = reaches(ahead, threshold, STRICT)
        elif RULE == PREFIX:
            chosen = at < edge
        elif RULE == SEGMENTS:
            least = as_scalar(number(rule.low, rule.low_of, rule.stride_low, b), tl.float32)
            best = best_of_runs(results, rule, place, b, at, key, low, high, RULE, BLOCK)
            chosen = (best & (score > least)) | (score > threshold)
        elif RULE == POSTERIOR:
            keep = as_scalar(number(rule.keep, rule.keep_of, rule.stride_keep, b), tl.float32)
            chosen = coins(place, rule, keys, b, at, PER_REQUEST) >= keep
        else:
            chosen = key > threshold
        chosen = chosen & may
        before += tl.sum(may.to(tl.int32), 0)
        count += tl.sum(chosen.to(tl.int32), 0)
        own = results.committed + b * (place.L >> 2) + at
        tl.store(own, (flags | tl.where(chosen, CHOSEN, 0)).to(tl.uint8), mask=at < high)
    tl.debug_barrier()

    # filled up to min_commit, or cut to max_commit
    missing = (rule.min_commit >> 2) - count
    most = rule.max_commit >> 2
    if missing > 0:
        before = tl.zeros([], tl.int32)
        for start in range(low, high, BLOCK):
            at = start + tl.arange(0, BLOCK)
            flags, _, key, may = tile(results, rule, place, b, at, high, RULE)
            rest = among(flags, may, REST)
            rank = ranks(
                results, rule, place, b, at, key, rest, before, low, high, REST, RULE, BLOCK
            )
            before += tl.sum(rest.to(tl.int32), 0)
            change(results, place, b, at, flags, rest & (rank < missing), high)
        tl.debug_barrier()
    if (most >= 0) & (count > most):
        before = tl.zeros([], tl.int32)
        for start in range(low, high, BLOCK):
            at = start + tl.arange(0, BLOCK)
            flags, _, key, may = tile(results, rule, place, b, at, high, RULE)
            taken = among(flags, may, TAKEN)
            rank = ranks(
                results, rule, place, b, at, key, taken, before, low, high, TAKEN, RULE, BLOCK
            )
            before += tl.sum(taken.to(tl.int32), 0)
            change(results, place, b, at, flags, taken & (rank >= most), high)
        tl.debug_barrier()

    write(place, results, b, low, high, PROPOSED, BLOCK_L)


@triton.jit
def change(results, place, b, at, flags, which, high):
    own = results.committed + b * (place.L >> 2) + at
    tl.store(own, (flags | tl.where(which, CHANGED, 0)).to(tl.uint8), mask=at < high)


@triton.jit
def coins(place, rule, keys, b, at, PER_REQUEST: tl.constexpr):
    """The posterior rule's uniforms of positions ``at``."""
    at = tl.minimum(at, (place.L >> 2) - 1).to(tl.int64)
    if rule.coins is None:
        seed, offset = seed_of(keys, b, PER_REQUEST), offset_of(keys, b)
        u = uniform(COMMIT, seed, offset, position_of(keys, b, at), at * 0)
    else:
        u = tl.load(rule.coins + b * (rule.stride_coins_b >> 2) + at * (rule.stride_coins_l >> 2))
    return u


@triton.jit
def write(place, results, b, low, high, PROPOSED: tl.constexpr, BLOCK_L: tl.constexpr):
    """All L positions: tokens, flags and scores as the caller gets them, and the counts."""
    count, left = tl.zeros([BLOCK_L], tl.int32), tl.zeros([BLOCK_L], tl.int32)
    for start in range(0, (place.L >> 2), BLOCK_L):
        at = (start + tl.arange(0, BLOCK_L)).to(tl.int64)
        real = at < (place.L >> 2)
        inside = (at >= low) & (at < high)
        own = b * (place.L >> 2) + at
        flags = tl.load(results.committed + own, mask=inside, other=0).to(tl.int32)
        score = tl.load(results.confidence + own, mask=inside, other=float("nan"))
        masked = (flags & MASKED) != 0
        where = b * (place.stride_tokens_b >> 2) + at * (place.stride_tokens_l >> 2)
        token = tl.load(place.tokens + where, mask=real, other=0)
        where = b * (results.stride_proposals_b >> 2) + at * (results.stride_proposals_l >> 2)
        proposal = tl.load(results.proposals + where, mask=masked, other=-1).to(tl.int64)
        chosen, changed = (flags & CHOSEN) != 0, (flags & CHANGED) != 0
        committed = masked & (chosen ^ changed)
        tl.debug_barrier()  # what is written now was read by other threads, as another type
        tl.store(results.committed + own, committed.to(tl.uint8), mask=real)
        sure = tl.where(masked & (score == score), score, -INFINITY)
        tl.store(results.confidence + own, sure, mask=real)
        to = results.tokens + b * (results.stride_b >> 2) + at * (results.stride_l >> 2)
        tl.store(to, tl.where(committed, proposal, token), mask=real)
        if PROPOSED:
            proposal = tl.where(proposal >= 0, proposal, token)
            tl.store(results.proposals + where, proposal, mask=real)
        count += committed.to(tl.int32)
        left += (masked & (chosen == changed)).to(tl.int32)
    tl.store(results.num_committed + b, tl.sum(count, 0))
    tl.store(results.num_left + b, tl.sum(left, 0))


# ---- on the host ---------------------------------------------------------------------------------

MOST = 1 << 28  # rows of a window; past it an int would be of another type, so another binary


def rule_of(
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
    external: Tensor | None,
    coins: Tensor | None,
) -> tuple[Rule, dict[str, Any]]:
    """The schema's arguments as kernels see them, and the constexprs of a rule. Numbers that it
    does not read are left out, so that they make no other binary."""
    reads = {
        "top_k": "k",
        "sequential": "k",
        "factor": "factor",
        "segments": "threshold low",
        "posterior": "keep",
        "threshold": "threshold slack",
    }.get(rule, "threshold")

    def pair(name: str, value: Any, tensor: Tensor | None) -> tuple[Any, Any, int]:
        if name not in reads.split():
            return (None if name == "slack" else plain(0)), None, 0
        return (plain(value) if name == "k" else value), tensor, stride0(tensor)

    off = slack_tensor is None and slack <= 0
    made = Rule(
        *pair("k", k, k_tensor),
        *pair("threshold", float(threshold), threshold_tensor),
        *((None, None, 0) if off else pair("slack", float(slack), slack_tensor)),
        *pair("factor", float(factor), factor_tensor),
        *pair("low", float(low), low_tensor),
        *pair("keep", float(keep), keep_tensor),
        plain(min(min_commit, MOST)),
        plain(min(max_commit, MOST)),
        *two(external if rule == "external" else None),
        *two(coins if rule == "posterior" else None),
    )
    return made, dict(RULE=NAMES.index(rule), STRICT=strict)
