"""Supports of filters as thresholds on values, found without a sort: the exact search.

top-k keeps v iff fewer than k entries lie strictly above it; top-p keeps v iff the mass strictly
above it is under top_p. Both are "weight strictly above v < bound", whose lowest such v is found by
comparing entries with a few pivots at once, again and again. Pivots are integers that order as the
floats do; after each turn the limits move up to the next entries, so the search ends when one value
is left. It goes over a row's candidates (``supports``), or where those do not suffice over the row.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .vocabulary import INFINITY, admitted, as_scalar, number, weights

PIVOTS = tl.constexpr(8)
TILE = tl.constexpr(512)
CANDIDATES = tl.constexpr(256)  # that a chunk has room for


class Source(NamedTuple):
    """The entries to be searched: a row's candidates, or the row as it is."""

    row: Any
    V: Any
    found: Any  # candidates fp32 [C, CANDIDATES], or None: the row
    inside: Any  # int32 [C]: of each chunk the first so many count
    C: Any
    whole: Any  # a scalar: the row
    tiles: Any  # of TILE entries


@triton.jit
def candidate_tile(values, inside, C, n, nothing, BLOCK_C: tl.constexpr, SLOTS: tl.constexpr):
    """[BLOCK_C, SLOTS] candidates of all chunks; ``nothing`` where there is none."""
    c, slot = tl.arange(0, BLOCK_C), tl.arange(0, SLOTS) + n * SLOTS
    count = tl.load(inside + c, mask=c < C, other=0)
    at = c[:, None] * CANDIDATES + slot[None, :]
    there = (slot[None, :] < count[:, None]) & (slot[None, :] < CANDIDATES)
    return tl.load(values + at, mask=there, other=nothing)


@triton.jit
def tile_of(source, edits, n, BLOCK_C: tl.constexpr, SLOTS: tl.constexpr):
    """Some entries; -inf beyond them."""
    SIZE: tl.constexpr = BLOCK_C * SLOTS
    if source.found is None or source.whole:
        x = admitted(source.row, edits, n * SIZE, source.V, SIZE)
    else:
        x = candidate_tile(source.found, source.inside, source.C, n, -INFINITY, BLOCK_C, SLOTS)
        x = tl.reshape(x, [SIZE])
    return x


@triton.jit
def ordered(x):
    """A uint32 that orders as the float does; 0 and -0 are one."""
    bits = (x + 0.0).to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, ~bits, bits | 0x80000000)


@triton.jit
def value_of(key):
    """The float of an ordered uint32."""
    bits = tl.where(key >= 0x80000000, key & 0x7FFFFFFF, ~key)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def search_limits(holds, low, high, lowest, top):
    """Keys between which the threshold lies: a bracket's that holds it, or all the row's."""
    low = tl.where(holds, ordered(low) - 1, ordered(lowest))
    high = tl.where(holds, tl.minimum(ordered(high), ordered(top)), ordered(top))
    # entries that tie at +inf need no search
    return tl.where(top == INFINITY, high, low), high


@triton.jit
def lowest_kept(
    source, edits, top, scale, floor, least_weight, above, bound, low, high,
    BLOCK_C: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The lowest value above which the entries weigh less than ``bound``.

    An entry weighs e(v), but at least ``least_weight``, and nothing below ``floor``; what is not in
    the source weighs ``above`` and lies above it. The value lies above the key ``low``, and not
    above ``high``.
    """
    SIZE: tl.constexpr = BLOCK_C * SLOTS
    turn = (tl.arange(0, PIVOTS) + 1).to(tl.uint32)
    while high - low > 1:
        step = (high - low) // (PIVOTS + 1)
        pivots = tl.minimum(low + turn * tl.where(step == 0, step + 1, step), high)
        weight = tl.zeros([SIZE, PIVOTS], tl.float32)
        for n in range(source.tiles):
            x = tile_of(source, edits, n, BLOCK_C, SLOTS)
            w = tl.where(x >= floor, tl.maximum(weights(x, top, scale), least_weight), 0.0)
            weight += tl.where(ordered(x)[:, None] > pivots[None, :], w[:, None], 0.0)
        under = above + tl.sum(weight, 0) < bound
        high = tl.min(tl.where(under, pivots, high), 0)
        low = tl.max(tl.where(under, low, pivots), 0)

        # only entries can be thresholds: the lowest and the largest that are left
        lowest = tl.zeros([SIZE], tl.uint32) + high
        largest = tl.zeros([SIZE], tl.uint32) + low
        for n in range(source.tiles):
            key = ordered(tile_of(source, edits, n, BLOCK_C, SLOTS))
            lowest = tl.where(key > low, tl.minimum(lowest, key), lowest)
            largest = tl.where(key <= high, tl.maximum(largest, key), largest)
        low = tl.min(lowest, 0) - 1
        high = tl.maximum(tl.max(largest, 0), low + 1)
    return value_of(high)


@triton.jit
def weight_from(
    source, edits, top, scale, floor, least_weight, BLOCK_C: tl.constexpr, SLOTS: tl.constexpr
):
    """What entries x >= floor weigh, each at least ``least_weight``; -inf nothing."""
    total = tl.zeros([BLOCK_C * SLOTS], tl.float32)
    for n in range(source.tiles):
        x = tile_of(source, edits, n, BLOCK_C, SLOTS)
        w = tl.where(x > -INFINITY, tl.maximum(weights(x, top, scale), least_weight), 0.0)
        total += tl.where(x >= floor, w, 0.0)
    return tl.sum(total, 0)


@triton.jit
def sought(numbers, b, V):
    """(k, share) of a request's top-k and top-p: 0 and 1 where they are off, which are top_k <= 0
    or >= V, and top_p >= 1 or NaN."""
    k, share = tl.zeros([], tl.int64), tl.full([], 1.0, tl.float32)
    if numbers.top_k is not None:
        top_k = number(numbers.top_k, numbers.top_k_of, numbers.stride_top_k, b)
        k = as_scalar(top_k, tl.int64)
        k = tl.where((k > 0) & (k < V), k, 0)
    if numbers.top_p is not None:
        top_p = number(numbers.top_p, numbers.top_p_of, numbers.stride_top_p, b)
        share = as_scalar(top_p, tl.float32)
        share = tl.where(share < 1, share, 1.0)
    return k, share


@triton.jit
def least_share(share, left):
    """The mass that top-p keeps at least: never nothing, so that the top stays."""
    return tl.maximum(share * left, 1e-38)
