"""Counts of a row's entries by value, and between which values they tell that a threshold lies.

The first read of a row leaves a histogram a chunk: of BINS bins of 1/8 on an absolute grid of raw
logits, the first being the one of the chunk's top. Those of a row are shifted to its top and added
up. Then the bin of top-k's threshold is known, and of top-p's threshold some bins that hold it.
Entries further down are not counted; a bracket that is wrong for that or any other reason is found
out by ``supports``, which sees the entries.
"""

import triton
import triton.language as tl

from .thresholds import CANDIDATES
from .vocabulary import INFINITY

BINS = tl.constexpr(256)
WORDS = tl.constexpr(128)  # of 32 bits a histogram takes
STEPS = tl.constexpr(8.0)  # bins to 1
AT_ONCE = tl.constexpr(8)  # histograms that are added up in one go
ROUNDING = tl.constexpr(1e-5)  # more than the relative error of a sum of bins, and of Z


@triton.jit
def grid(x):
    return tl.floor(x * STEPS)


@triton.jit
def leave_counts(counts, x, top):
    """The histogram of entries x of a chunk, uint16 [BINS]."""
    bin = grid(top) - grid(x)
    counted = bin < BINS  # infinite or NaN where x or the top is infinite
    bin = tl.where(counted, bin, 0.0).to(tl.int32)
    n = tl.histogram(bin, BINS, mask=counted)
    tl.store(counts + tl.arange(0, BINS), n.to(tl.uint16))


@triton.jit
def row_counts(counts, tops, C, top):
    """int32 [BINS] of a row, from its chunks' histograms and tops."""
    o_c, bin = tl.arange(0, AT_ONCE), tl.arange(0, BINS)
    total = tl.zeros([BINS], tl.int32)
    for first in range(0, C, AT_ONCE):
        c = first + o_c
        t = tl.load(tops + c, mask=c < C, other=float("-inf"))
        shift = grid(top) - grid(t)
        shift = tl.where(shift < BINS, shift, BINS * 1.0).to(tl.int32)
        own = bin[None, :] - shift[:, None]
        n = tl.load(counts + c[:, None] * BINS + own, mask=own >= 0, other=0)
        total += tl.sum(n.to(tl.int32), 0)
    return total


@triton.jit
def total_of(mask, values):
    return tl.sum(tl.where(mask, values, 0), 0)


@triton.jit
def brackets(counts, tops, C, V, top, Z, scale, k, share, JOINT: tl.constexpr):
    """(low, high) of top-k's threshold and of top-p's: low <= threshold < high.

    Both +inf: nothing is known, or the filter is off; -inf all: so are both, or nothing needs to be
    known.
    """
    searched = ((k > 0) | (share < 1)) & (top < INFINITY)
    nothing = tl.where(searched, INFINITY, -INFINITY)
    k_low, k_high, p_low, p_high = nothing, nothing, nothing, nothing
    if searched:
        n = row_counts(counts, tops, C, top)
        bin = tl.arange(0, BINS)
        edge = grid(top)
        count = tl.cumsum(n, 0)
        kth = tl.full([], BINS, tl.int32)
        if k > 0:
            kth = tl.min(tl.where(count >= k, bin, BINS), 0)
            k_low, k_high = between(edge, kth, kth)
        if share < 1:
            # each bin weighs no more than at its upper edge, no less than at its lower; one entry
            # is the top
            upper = tl.exp2(tl.minimum((edge - bin + 1) / STEPS - top, 0.0) * scale)
            lower = tl.exp2(tl.minimum((edge - bin) / STEPS - top, 0.0) * scale)
            most, least = n * upper, n * lower
            least = tl.where((bin == 0) & (n > 0), 1.0 + (n - 1) * lower, least)

            # so much lies in a bin and those above it: counted from the top, or what those below
            # leave of Z, which is closer where most of the mass is a few entries
            beyond = tl.exp2(((edge - BINS + 1) / STEPS - top) * scale) * (V - tl.sum(n, 0))
            below_least = tl.sum(least, 0) - tl.cumsum(least, 0)
            below_most = tl.sum(most, 0) - tl.cumsum(most, 0) + beyond
            slack = Z * ROUNDING
            to_most = tl.cumsum(most, 0) * (1 + ROUNDING)
            to_most = tl.minimum(to_most, Z - below_least + slack)
            to_least = tl.cumsum(least, 0) * (1 - ROUNDING)
            to_least = tl.maximum(to_least, Z - below_most - slack)

            # what top-k leaves
            at_least, at_most = Z, Z
            if not JOINT:  # noqa: SIM102 (known at compile time)
                if k > 0:
                    size = tl.maximum(total_of(bin == kth, n), 1).to(tl.float32)
                    part = (k - total_of(bin < kth, n)).to(tl.float32) / size
                    part = tl.where(bin == kth, part, 1.0)
                    cut = Z - slack - below_most - most * (1.0 - part)
                    at_least = total_of(bin <= kth, least * part)
                    at_least = tl.maximum(at_least, total_of(bin == kth, cut))
                    at_most = tl.where(kth < BINS, total_of(bin == kth, to_most), Z)

            # bins that may hold the threshold, and the one that is likeliest to
            first = tl.min(tl.where(to_most >= share * at_least, bin, BINS), 0)
            last = tl.min(tl.where(to_least >= share * at_most, bin, BINS - 1), 0)
            likely = to_most + to_least >= share * (at_most + at_least)
            middle = tl.min(tl.where(likely, bin, BINS - 1), 0)
            middle = tl.maximum(tl.minimum(middle, last), first)

            # around that one as many as there is room for, chunks being unlike each other
            room = C * (CANDIDATES // 8)
            before, after = total_of(bin < middle, n), total_of(bin <= middle, n)
            near = (bin >= first) & (before - (count - n) <= room)
            first = tl.minimum(middle, tl.min(tl.where(near, bin, BINS), 0))
            near = (bin <= last) & (count - after <= room)
            last = tl.maximum(middle, tl.max(tl.where(near, bin, 0), 0))
            p_low, p_high = between(edge, first, last)
    return k_low, k_high, p_low, p_high


@triton.jit
def between(edge, first, last):
    """Values [low, high) of the bins first .. last; +inf both where there are none."""
    low = tl.where(last < BINS, (edge - last) / STEPS, INFINITY)
    high = tl.where((first > 0) & (first < BINS), (edge - first + 1) / STEPS, INFINITY)
    return tl.where(first < BINS, low, INFINITY), high
