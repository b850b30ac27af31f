"""Orders and sets of a window's rows: what the commit rules are made of. One request a program.

No sort: a row's rank is how many rows lie before it in the rule's order, counted by comparing all
pairs of the window, a tile at a time; orders by position are cumulative sums. The results serve as
the state of the work: ``confidence`` holds scores (NaN: never to be committed) and ``committed``
the flags below, until the last sweep makes of them what the caller gets.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .rows import window_start

NAMES = (
    *("top_k", "threshold", "factor", "entropy", "entropy_bound"),
    *("prefix", "sequential", "segments", "posterior", "external"),
)
TOP_K, THRESHOLD, FACTOR = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
ENTROPY, ENTROPY_BOUND, PREFIX = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
SEQUENTIAL, SEGMENTS, POSTERIOR = tl.constexpr(6), tl.constexpr(7), tl.constexpr(8)
EXTERNAL = tl.constexpr(9)

MASKED, CHOSEN, CHANGED = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
ALL, REST, TAKEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # sets that ranks are among
FAR = tl.constexpr(2147483647)


class Rule(NamedTuple):
    """A rule's numbers, pairs of the schema with strides along requests. Never specialised."""

    k: Any
    k_of: Any
    stride_k: Any
    threshold: Any
    threshold_of: Any
    stride_threshold: Any
    slack: Any  # None: off
    slack_of: Any
    stride_slack: Any
    factor: Any
    factor_of: Any
    stride_factor: Any
    low: Any
    low_of: Any
    stride_low: Any
    keep: Any
    keep_of: Any
    stride_keep: Any
    min_commit: Any  # as ``plain`` has it, and so is the next
    max_commit: Any  # -1: no limit
    external: Any  # [B, L], or None
    stride_external_b: Any
    stride_external_l: Any
    coins: Any  # [B, L] draws of the posterior rule, or None: its own
    stride_coins_b: Any
    stride_coins_l: Any


class Results(NamedTuple):
    """Where they go: contiguous but for ``tokens``, which may be the tokens that are read."""

    tokens: Any  # [B, L]
    stride_b: Any
    stride_l: Any
    committed: Any  # bytes [B, L]
    num_committed: Any  # [B]
    num_left: Any
    confidence: Any  # [B, L]
    proposals: Any  # [B, L], any strides
    stride_proposals_b: Any
    stride_proposals_l: Any
    runs: Any  # int32 [B, L] for the rule "segments", else None


@triton.jit
def clipped_window(place, b):
    """[low, high) of request b's positions, int32."""
    start = tl.maximum(tl.minimum(window_start(place, b), (place.L >> 2)), -(place.L >> 2))
    high = tl.maximum(tl.minimum(start + (place.length >> 2), (place.L >> 2)), 0)
    return tl.maximum(start, 0).to(tl.int32), high.to(tl.int32)


@triton.jit
def tile(results, rule, place, b, at, high, RULE: tl.constexpr):
    """(flags, score, key, whether it may be committed) of positions ``at``, those below high."""
    inside = at < high
    own = b * (place.L >> 2) + at
    flags = tl.load(results.committed + own, mask=inside, other=0).to(tl.int32)
    score = tl.load(results.confidence + own, mask=inside, other=float("nan"))
    may = (score == score) & ((flags & MASKED) != 0)
    if RULE == EXTERNAL:
        where = rule.external + b * (rule.stride_external_b >> 2)
        key = tl.load(where + at * (rule.stride_external_l >> 2), mask=inside, other=float("nan"))
        key = key.to(tl.float32)
        may = may & (key == key)
    else:
        key = score
    return flags, score, key, may


@triton.jit
def among(flags, may, WHICH: tl.constexpr):
    if WHICH == REST:
        members = may & ((flags & CHOSEN) == 0)
    elif WHICH == TAKEN:
        members = may & ((flags & CHOSEN) != 0)
    else:
        members = may
    return members


@triton.jit
def ranks(
    results,
    rule,
    place,
    b,
    at,
    key,
    members,
    before,
    low,
    high,
    WHICH: tl.constexpr,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many members of a set lie before each row of a tile, in the rule's order; ``before``:
    members in earlier tiles."""
    if RULE == PREFIX or RULE == SEQUENTIAL or RULE == POSTERIOR:  # noqa: SIM109
        one = members.to(tl.int32)
        rank = before + tl.cumsum(one, 0) - one
    else:
        ahead = tl.zeros([BLOCK, BLOCK], tl.int32)
        for start in range(low, high, BLOCK):
            at_j = start + tl.arange(0, BLOCK)
            flags, _, key_j, may = tile(results, rule, place, b, at_j, high, RULE)
            first = precedes(key_j[None, :], at_j[None, :], key[:, None], at[:, None])
            ahead += tl.where(first & among(flags, may, WHICH)[None, :], 1, 0)
        rank = tl.sum(ahead, 1)
    return rank


@triton.jit
def precedes(key, at, other_key, other_at):
    return (key > other_key) | ((key == other_key) & (at < other_at))


@triton.jit
def reaches(c, threshold, STRICT: tl.constexpr):
    if STRICT:
        yes = c > threshold
    else:
        yes = c >= threshold
    return yes


@triton.jit
def find_runs(results, place, b, low, high, BLOCK: tl.constexpr):
    """Numbers the runs of adjacent masked rows."""
    before = tl.zeros([], tl.int32)
    for start in range(low, high, BLOCK):
        at = start + tl.arange(0, BLOCK)
        own = results.committed + b * (place.L >> 2) + at
        masked = tl.load(own, mask=at < high, other=0).to(tl.int32) & MASKED
        previous = tl.load(own - 1, mask=(at > low) & (at < high), other=0).to(tl.int32) & MASKED
        begins = tl.where((masked == 1) & (previous == 0), 1, 0)
        run = before + tl.cumsum(begins, 0)
        tl.store(results.runs + b * (place.L >> 2) + at, run, mask=at < high)
        before += tl.sum(begins, 0)
    tl.debug_barrier()


@triton.jit
def sums_ahead(
    results, rule, place, b, at, key, low, high, RULE: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum of the scores of the rows that precede each row of a tile."""
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(low, high, BLOCK):
        at_j = start + tl.arange(0, BLOCK)
        _, _, key_j, may = tile(results, rule, place, b, at_j, high, RULE)
        first = precedes(key_j[None, :], at_j[None, :], key[:, None], at[:, None])
        total += tl.where(first & may[None, :], key_j[None, :], 0.0)
    return tl.sum(total, 1)


@triton.jit
def best_of_runs(
    results, rule, place, b, at, key, low, high, RULE: tl.constexpr, BLOCK: tl.constexpr
):
    """Whether no row of its run precedes a row of a tile."""
    ahead = tl.zeros([BLOCK, BLOCK], tl.int32)
    runs = results.runs + b * (place.L >> 2)
    run = tl.load(runs + at, mask=at < high, other=0)
    for start in range(low, high, BLOCK):
        at_j = start + tl.arange(0, BLOCK)
        _, _, key_j, may = tile(results, rule, place, b, at_j, high, RULE)
        run_j = tl.load(runs + at_j, mask=at_j < high, other=0)
        first = precedes(key_j[None, :], at_j[None, :], key[:, None], at[:, None])
        first = first & (run_j[None, :] == run[:, None])
        ahead += tl.where(first & may[None, :], 1, 0)
    return tl.sum(ahead, 1) == 0
