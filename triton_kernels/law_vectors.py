"""Several rows of a request's law at once: what ``law_rows`` does to one, on a vector of rows."""

import triton
import triton.language as tl

from .vocabulary import INFINITY, NO_TOKEN, weights

TILE = tl.constexpr(2048)  # chunks whose numbers are read at once


@triton.jit
def place_rows(law, b, i):
    """``place`` of rows i, a vector; rows past R are neither present nor inside."""
    at = b.to(tl.int64) * law.R + i
    real = i < law.R
    if law.index is None:
        row = law.x + b.to(tl.int64) * law.stride_b + i.to(tl.int64) * law.stride_r
        present, inside = real, real
    else:
        where = law.index + b.to(tl.int64) * law.stride_index_b
        index = tl.load(where + i.to(tl.int64) * law.stride_index_r, mask=real, other=-1)
        index = index.to(tl.int64)
        present = index != -1
        inside = (index >= 0) & (index < (law.num_rows >> 2))
        row = law.x + tl.where(inside, index, 0) * law.stride_r
    return at, row, present, inside


@triton.jit
def read_laws(law, at, ready, scale, BLOCK_C: tl.constexpr):
    """``read_law`` of rows ``at``; rows that are not ready have no law, and Z = 1."""
    SIDE: tl.constexpr = BLOCK_C if ready.shape[0] * BLOCK_C <= TILE else TILE // ready.shape[0]
    stats = law.stats + at * 3 * law.C
    top, broken, Z = ready * 0.0 - INFINITY, ready * 0, ready * 0.0
    best = broken + NO_TOKEN
    for start in range(0, law.C, SIDE):
        t, s, bests = chunk_tile(law, stats, ready, start, SIDE)
        number = t == t
        broken = tl.maximum(broken, tl.max(tl.where(number, 0, 1), 1))
        high = tl.max(tl.where(number, t, -INFINITY), 1)
        lowest = tl.min(tl.where(t == high[:, None], bests, NO_TOKEN), 1)
        best = tl.where(high > top, lowest, best)  # of equal tops the first chunk's is the lowest
        top = tl.maximum(top, high)
        if SIDE == BLOCK_C:
            Z = total_of(law, t, s, top, scale)
    if SIDE != BLOCK_C:
        for start in range(0, law.C, SIDE):
            t, s, bests = chunk_tile(law, stats, ready, start, SIDE)
            Z += total_of(law, t, s, top, scale)
    good = ready & (broken == 0) & (Z > 0) & (Z < INFINITY)
    return top, tl.where(good, Z, 1.0), best, good


@triton.jit
def chunk_tile(law, stats, ready, start, SIDE: tl.constexpr):
    """(tops, sums, argmaxes) of some chunks of several rows."""
    fill = -INFINITY
    if law.PROBS:
        fill = 0.0
    c = start + tl.arange(0, SIDE)
    mask = ready[:, None] & (c < law.C)[None, :]
    lines = stats[:, None] + c[None, :]
    t = tl.load(lines, mask=mask, other=fill)
    s = tl.load(lines + law.C, mask=mask, other=0.0)
    bests = (lines + 2 * law.C).to(tl.pointer_type(tl.int32))
    return t, s, tl.load(bests, mask=mask, other=NO_TOKEN)


@triton.jit
def total_of(law, tops, sums, top, scale):
    """What some chunks of several rows add to Z."""
    if law.PROBS:
        total = tl.sum(sums, 1)
    else:
        total = tl.sum(sums * weights(tops, top[:, None], scale), 1)
    return total


@triton.jit
def read_floors(law, at, good, Z):
    """``floor_of`` of rows ``at``."""
    floor = Z * 0 - INFINITY
    if law.floors is not None:
        floor = tl.load(law.floors + 2 * at, mask=good, other=0.0)
        Z = tl.load(law.floors + 2 * at + 1, mask=good, other=1.0)
    return floor, Z


@triton.jit
def read_sums(sums, at, ready, C, BLOCK_C: tl.constexpr):
    """The totals of rows ``at`` of which ``sums`` [rows, C] has each chunk's; 0 if not ready."""
    SIDE: tl.constexpr = BLOCK_C if ready.shape[0] * BLOCK_C <= TILE else TILE // ready.shape[0]
    total = ready * 0.0
    for start in range(0, C, SIDE):
        c = start + tl.arange(0, SIDE)
        lines = (sums + at * C)[:, None] + c[None, :]
        total += tl.sum(tl.load(lines, mask=ready[:, None] & (c < C)[None, :], other=0.0), 1)
    return total
