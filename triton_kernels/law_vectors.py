"""Several rows of a request's law at once: what ``law_rows`` does to one, on a vector of rows."""

import triton
import triton.language as tl

from .vocabulary import INFINITY, NO_TOKEN, weights


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
    stats = law.stats + at * 3 * law.C
    fill = -INFINITY
    if law.PROBS:
        fill = 0.0
    if ready.shape[0] <= 256:
        c = tl.arange(0, BLOCK_C)
        mask = ready[:, None] & (c < law.C)[None, :]
        lines = stats[:, None] + c[None, :]
        t = tl.load(lines, mask=mask, other=fill)
        s = tl.load(lines + law.C, mask=mask, other=0.0)
        bests = (lines + 2 * law.C).to(tl.pointer_type(tl.int32))
        a = tl.load(bests, mask=mask, other=NO_TOKEN)
        number = t == t
        top = tl.max(tl.where(number, t, -INFINITY), 1)
        best = tl.min(tl.where(t == top[:, None], a, NO_TOKEN), 1)
        if law.PROBS:
            Z = tl.sum(s, 1)
        else:
            Z = tl.sum(s * weights(t, top[:, None], scale), 1)
        whole = tl.max(tl.where(number, 0, 1), 1) == 0
    else:  # so many rows that a chunk of each is a vector
        top, Z = ready * 0.0 - INFINITY, ready * 0.0
        best, broken = ready * 0 + NO_TOKEN, ready * 0
        for c in range(law.C):
            t = tl.load(stats + c, mask=ready, other=fill)
            bests = (stats + 2 * law.C + c).to(tl.pointer_type(tl.int32))
            a = tl.load(bests, mask=ready, other=NO_TOKEN)
            broken = tl.where(t == t, broken, 1)
            best = tl.where(t > top, a, best)  # of equal tops the first chunk's is the lowest
            top = tl.where(t > top, t, top)
        for c in range(law.C):
            t = tl.load(stats + c, mask=ready, other=fill)
            s = tl.load(stats + law.C + c, mask=ready, other=0.0)
            if law.PROBS:
                Z += s
            else:
                Z += s * weights(t, top, scale)
        whole = broken == 0
    good = ready & whole & (Z > 0) & (Z < INFINITY)
    return top, tl.where(good, Z, 1.0), best, good


@triton.jit
def read_floors(law, at, good, Z):
    """``floor_of`` of rows ``at``."""
    floor = Z * 0 - INFINITY
    if law.floors is not None:
        floor = tl.load(law.floors + 2 * at, mask=good, other=0.0)
        Z = tl.load(law.floors + 2 * at + 1, mask=good, other=1.0)
    return floor, Z
