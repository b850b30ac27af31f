"""Supports of filters as thresholds on values, found without a sort.

top-k keeps v iff fewer than k entries lie strictly above it; top-p keeps v iff the mass strictly
above it is under top_p. Both are "weight strictly above v < bound", whose lowest such v is found by
comparing all entries with a few pivots at once, again and again. Pivots are integers that order as
the floats do, so the search ends after a fixed number of turns: 4 for 16-bit logits, 11 for fp32.
The first turn reads the row, and the others find it in the L2 cache.
"""

import triton
import triton.language as tl

from .vocabulary import INFINITY, admitted, as_scalar, weights

PIVOTS = tl.constexpr(8)
TILE = tl.constexpr(2048)


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
def lowest_kept(row, edits, V, top, scale, floor, bound, lowest, BY_MASS: tl.constexpr):
    """The lowest value above which the entries weigh less than ``bound``.

    An entry weighs 1, or e(v) with BY_MASS, and nothing below ``floor``. The search starts above
    ``lowest``, which all but the last digits of the mass lie above. A row whose top is +inf needs
    no search: its entries tie.
    """
    low, high = ordered(lowest), ordered(top)
    if top == INFINITY:
        low = high
    turn = (tl.arange(0, PIVOTS) + 1).to(tl.uint32)
    while high - low > 1:
        step = (high - low) // (PIVOTS + 1)
        pivots = tl.minimum(low + turn * tl.where(step == 0, step + 1, step), high)
        above = tl.zeros([TILE, PIVOTS], tl.float32)
        for start in range(0, V, TILE):
            x = admitted(row, edits, start, V, TILE)
            if BY_MASS:
                w = tl.where(x >= floor, weights(x, top, scale), 0.0)
            else:
                w = tl.where(x >= floor, 1.0, 0.0)
            above += tl.where(ordered(x)[:, None] > pivots[None, :], w[:, None], 0.0)
        weight = tl.sum(above, 0)
        high = tl.min(tl.where(weight < bound, pivots, high), 0)
        low = tl.max(tl.where(weight < bound, low, pivots), 0)
    return value_of(high)


@triton.jit
def filters(row, edits, V, top, scale, Z, top_k, top_p, JOINT: tl.constexpr):
    """``floor``: entries x >= floor survive top-k and top-p.

    top_k, top_p: None is off; so are top_k <= 0 or >= V, and top_p >= 1 or NaN. Counts above 2**24
    would be rounded, as fp32: no vocabulary has them.
    """
    none = tl.full([], float("-inf"), tl.float32)
    floor = none
    if top_k is not None:
        k = as_scalar(top_k, tl.int64)
        if (k > 0) & (k < V):
            bound = k.to(tl.float32)
            floor = lowest_kept(row, edits, V, top, scale, none, bound, none, False)
    if top_p is not None:
        share = as_scalar(top_p, tl.float32)
        if share < 1:
            left, within = Z, none
            if not JOINT:
                within = floor
                if floor > -INFINITY:
                    left = mass_from(row, edits, V, top, scale, floor)
            # at least the top is kept; exp2(-64) of all entries is below every rounding
            bound = tl.maximum(share * left, 1e-38)
            lowest = top - 64.0 / scale
            if top == INFINITY:
                lowest = top
            at = lowest_kept(row, edits, V, top, scale, within, bound, lowest, True)
            floor = tl.maximum(floor, at)
    return floor


@triton.jit
def mass_from(row, edits, V, top, scale, floor):
    """Sum of e(v) over entries x >= floor."""
    total = tl.zeros([TILE], tl.float32)
    for start in range(0, V, TILE):
        x = admitted(row, edits, start, V, TILE)
        total += tl.where(x >= floor, weights(x, top, scale), 0.0)
    return tl.sum(total, 0)
