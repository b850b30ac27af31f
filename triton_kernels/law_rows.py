"""Rows of a target's or a draft's law, from logits or probabilities, for the verification kernels.

``law_prepare.prepare`` leaves a top, a sum and an argmax of each chunk, and the thresholds of the
filters. After that a kernel evaluates the law wherever it likes, from the logits as they are:

    at, row, present, inside = place(law, b, i)   # flat index of the row's numbers, pointer
    top, Z, best, good = read_law(law, at, scale, BLOCK_C)
    floor, Z = floor_of(law, at, Z)
    e = chunk_weights(law, row, bits, ...)       # p = e / Z
"""

import triton
import triton.language as tl

from .numerics import LN2
from .vocabulary import (
    INFINITY,
    NO_TOKEN,
    Edits,
    as_scalar,
    chunk_numbers,
    edited,
    load_chunk,
    number,
    row_of,
    weights,
)


@triton.jit
def place(law, b, i):
    """(flat index b R + i, pointer to the row, whether there is an index, whether it is a row)."""
    at = b.to(tl.int64) * law.R + i
    if law.index is None:
        row = law.x + b.to(tl.int64) * law.stride_b + i.to(tl.int64) * law.stride_r
        present = b >= 0
        inside = b >= 0
    else:
        index = tl.load(
            law.index + b.to(tl.int64) * law.stride_index_b + i.to(tl.int64) * law.stride_index_r
        ).to(tl.int64)
        present = index != -1
        inside = (index >= 0) & (index < (law.num_rows >> 2))
        row = law.x + tl.where(inside, index, 0) * law.stride_r
    return at, row, present, inside


@triton.jit
def row_bits(law, b, i):
    """Where a grammar's bits for row i of request b begin in ``law.allowed``."""
    return b.to(tl.int64) * law.stride_allowed_b + i.to(tl.int64) * law.stride_allowed_r


@triton.jit
def temperature_of(numbers, b):
    t = number(numbers.temperature, numbers.temperature_of, numbers.stride_temperature, b)
    return as_scalar(t, tl.float32)


@triton.jit
def least_of(numbers, b):
    """min-p's threshold on e(v) = p(v) / max p: 0 is off, and NaN too; above 1 the top stays."""
    least = tl.zeros([], tl.float32)
    if numbers.min_p is not None:
        least = number(numbers.min_p, numbers.min_p_of, numbers.stride_min_p, b)
        least = as_scalar(least, tl.float32)
    return tl.where(least > 0, tl.minimum(least, 1.0), 0.0)


@triton.jit
def raw_chunk(law, row, bits, start, CHUNK: tl.constexpr):
    """Logits (-inf where not allowed), or probabilities (0 there), of one chunk."""
    if law.PROBS:
        fill = 0.0
    else:
        fill = float("-inf")
    x = load_chunk(row, start, law.V, fill, CHUNK)
    return edited(x, Edits(law.allowed, bits), start, law.V, fill, CHUNK)


@triton.jit
def chunk_weights(law, row, bits, start, top, scale, floor, least, only, CHUNK: tl.constexpr):
    """e(v) of a chunk under temperature and filters; ``only`` >= 0: all mass on that token."""
    x = raw_chunk(law, row, bits, start, CHUNK)
    at = start + tl.arange(0, CHUNK)
    e = column_weights(law, x, top, scale, floor, least)
    one = tl.where(at == only, 1.0, 0.0)
    return tl.where(only >= 0, one, e)


@triton.jit
def draft_chunk(law, row, start, top, scale, floor, least, only, CHUNK: tl.constexpr):
    """e(v) of a draft's law on a chunk of the target's vocabulary; ``only``: one of its columns.

    A reduced vocabulary that ascends has its columns of a chunk side by side: they are spread out
    by counting. Any other is searched column by column: right, and slow.
    """
    if law.vocab is None:
        return chunk_weights(law, row, 0, start, top, scale, floor, least, only, CHUNK)
    else:
        at = tl.arange(0, CHUNK)
        e = tl.zeros([CHUNK], tl.float32)
        first = law.firsts + start // CHUNK
        if tl.load(law.firsts + law.target_C + 1) == 1:
            j0, j1 = tl.load(first), tl.load(first + 1)
            ids = tl.load(law.vocab + j0 + at, mask=j0 + at < j1, other=start)
            here = tl.histogram((ids - start).to(tl.int32), CHUNK, mask=j0 + at < j1)
            j = j0 + tl.cumsum(here, 0) - 1
            x = tl.load(row + j, mask=here > 0, other=0.0).to(tl.float32)
            e = column_weights(law, x, top, scale, floor, least)
            e = tl.where(only >= 0, tl.where(j == only, 1.0, 0.0), e)
            e = tl.where(here > 0, e, 0.0)
        else:
            for column in range(law.V):
                x = tl.load(row + column).to(tl.float32)
                w = column_weights(law, x, top, scale, floor, least)
                w = tl.where(only >= 0, tl.where(only == column, 1.0, 0.0), w)
                e += tl.where(start + at == tl.load(law.vocab + column), w, 0.0)
        return e


@triton.jit
def draft_token(law, row, token, top, scale, floor, least, only, CHUNK: tl.constexpr):
    """e(token) of a draft's law, of a token of the target's vocabulary."""
    if law.vocab is None:
        return token_weight(law, row, 0, token, top, scale, floor, least, only)
    else:
        e = tl.zeros([], tl.float32)
        first = law.firsts + token // CHUNK
        ascends = tl.load(law.firsts + law.target_C + 1) == 1
        j0 = tl.where(ascends, tl.load(first), 0)
        j1 = tl.where(ascends, tl.load(first + 1), law.V)
        for start in range(j0, j1, CHUNK):
            j = start + tl.arange(0, CHUNK)
            ids = tl.load(law.vocab + j, mask=j < j1, other=-1)
            x = tl.load(row + j, mask=ids == token, other=0.0).to(tl.float32)
            w = column_weights(law, x, top, scale, floor, least)
            w = tl.where(only >= 0, tl.where(j == only, 1.0, 0.0), w)
            e += tl.sum(tl.where(ids == token, w, 0.0), 0)
        return e


@triton.jit
def column_weights(law, x, top, scale, floor, least):
    """e of entries of a law without a grammar."""
    if law.PROBS:
        e = x
    else:
        e = weights(x, top, scale)
        e = tl.where(x >= floor, e, 0.0)
        e = tl.where(e >= least, e, 0.0)
    return e


@triton.jit
def token_weight(law, row, bits, token, top, scale, floor, least, only):
    """e(token) of one row, 0 outside the vocabulary."""
    inside = (token >= 0) & (token < law.V)
    x = tl.load(row + token, mask=inside, other=0.0).to(tl.float32)
    if law.PROBS:
        x = allowed_token(law, x, bits, token, inside, 0.0)
    else:
        x = allowed_token(law, x, bits, token, inside, float("-inf"))
    e = column_weights(law, x, top, scale, floor, least)
    e = tl.where(only >= 0, tl.where(token == only, 1.0, 0.0), e)
    return tl.where(inside, e, 0.0)


@triton.jit
def read_law(law, at, scale, BLOCK_C: tl.constexpr):
    """(top, unfiltered Z, argmax, whether the row has a law) from the chunks' numbers."""
    stats = law.stats + at * 3 * law.C
    if law.PROBS:
        t, s, a = chunk_numbers(stats, law.C, 0.0, BLOCK_C)
        top = tl.max(tl.where(t == t, t, 0.0), 0)
        best = tl.min(tl.where(t == top, a, NO_TOKEN), 0)
        Z = tl.sum(s, 0)
        broken = tl.max(tl.where(t == t, 0, 1), 0)
        good = (broken == 0) & (Z > 0) & (Z < INFINITY)
    else:
        top, Z, best = row_of(stats, scale, law.C, BLOCK_C)
        good = top > -INFINITY
    return top, Z, best, good


@triton.jit
def floor_of(law, at, Z):
    """(lowest logit that top-k and top-p leave, the mass that all filters leave)."""
    floor, mass = tl.full([], float("-inf"), tl.float32), Z
    if law.floors is not None:
        floor, mass = tl.load(law.floors + 2 * at), tl.load(law.floors + 2 * at + 1)
    return floor, mass


@triton.jit
def token_value(law, row, bits, token):
    """The logit of a token; -inf outside the vocabulary. Rows may be a vector."""
    inside = (token >= 0) & (token < law.V)
    x = tl.load(row + token, mask=inside, other=0.0).to(tl.float32)
    x = allowed_token(law, x, bits, token, inside, float("-inf"))
    return tl.where(inside, x, float("-inf"))


@triton.jit
def token_log(law, row, bits, token, top, scale, Z):
    """log p(token) of the law before filters; -inf outside the vocabulary. Rows may be a vector."""
    inside = (token >= 0) & (token < law.V)
    x = tl.load(row + token, mask=inside, other=0.0).to(tl.float32)
    if law.PROBS:
        x = allowed_token(law, x, bits, token, inside, 0.0)
        log = tl.log2(x / Z) * LN2
    else:
        x = allowed_token(law, x, bits, token, inside, float("-inf"))
        log = (tl.where(x == top, 0.0, (x - top) * scale) - tl.log2(Z)) * LN2
    return tl.where(inside, log, float("-inf"))


@triton.jit
def allowed_token(law, x, bits, token, inside, fill):
    """x if a grammar's bits allow its token, else ``fill``."""
    if law.allowed is not None:
        word = tl.load(law.allowed + bits + token // 32, mask=inside, other=0)
        x = tl.where((word >> (token % 32).to(tl.int32)) & 1 == 1, x, fill)
    return x
