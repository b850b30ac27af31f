"""What the decode kernel does tile by tile: functions that it inlines.

Scores stay raw (q k^T, capped if there is a softcap), and ``scale`` > 0 turns them into base 2:
p = 2^(scale * (s - max)). A softmax scale's SIGN is theirs.
"""

import triton
import triton.language as tl

from .numerics import decoded, dot, narrowed, tanh


@triton.jit
def number_of(x, b, stride):
    """A number that a server changes: a Python one, or request b's entry of a tensor."""
    if x.dtype.is_ptr():
        return tl.load(x + b * stride).to(tl.int64)
    else:
        return x.to(tl.int64)


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def ones(x):
    """How many bits of an int64 are set."""
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    x = x + (x >> 8)
    x = x + (x >> 16)
    x = x + (x >> 32)
    return (x & 0x7F).to(tl.int32)


@triton.jit
def place(positions, table, seen, b, num_pages, PAGE: tl.constexpr):
    """Page and slot of request b's cached positions, and which of those ``seen`` are mapped."""
    if table is None:  # a request is its own page
        page, slot = tl.zeros_like(positions).to(tl.int64) + b, positions.to(tl.int64)
    else:
        page = tl.load(table + positions // PAGE, mask=seen, other=-1).to(tl.int64)
        seen = (page >= 0) & (page < num_pages)
        page, slot = tl.where(seen, page, 0), (positions % PAGE).to(tl.int64)
    return page, slot, seen


@triton.jit
def place_full(t, o_n, table, b, num_pages, PAGE: tl.constexpr, BN: tl.constexpr):
    """``place`` of a tile that every row sees; without a table all is mapped."""
    if table is None:
        page, slot, mapped = b + tl.zeros_like(o_n), t.to(tl.int64) * BN + o_n, o_n >= 0
    elif PAGE % BN == 0:  # one page
        page = tl.load(table + t // (PAGE // BN)).to(tl.int64) + tl.zeros_like(o_n)
        slot = ((t % (PAGE // BN)) * BN + o_n).to(tl.int64)
        mapped = (page >= 0) & (page < num_pages)
        page = tl.where(mapped, page, 0)
    else:
        page = tl.load(table + (t * BN + o_n) // PAGE).to(tl.int64)
        slot = ((t * BN + o_n) % PAGE).to(tl.int64)
        mapped = (page >= 0) & (page < num_pages)
        page = tl.where(mapped, page, 0)
    return page, slot, mapped


@triton.jit
def at_rows(rows, mapped, LEAN: tl.constexpr):
    """Where a tile's rows lie and which are mapped, as they are. LEAN: by way of a reduction, which
    leaves them in shared memory. A thread that reads an element of each row would work out all of
    them for itself, and hold what it does so from."""
    if LEAN:
        o_n = tl.arange(0, rows.shape[0])
        rows = tl.where((o_n[:, None] == o_n[None, :]) & mapped[None, :], rows[None, :], -1)
        rows = tl.max(rows, 1)
        mapped = rows >= 0
        rows = tl.maximum(rows, 0)
    return rows, mapped


@triton.jit
def read(x, rows, mapped, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BN, BLOCK_D] from row offsets; 0 where not mapped (None: all are) and past D."""
    o_d = tl.arange(0, BLOCK_D)
    pointers = x + rows[:, None] + o_d[None, :]
    if mapped is None and D >= BLOCK_D:
        b_x = tl.load(pointers)
    elif mapped is None:
        b_x = tl.load(pointers, mask=(o_d < D)[None, :], other=0)
    elif D >= BLOCK_D:
        b_x = tl.load(pointers, mask=mapped[:, None], other=0)
    else:
        b_x = tl.load(pointers, mask=mapped[:, None] & (o_d < D)[None, :], other=0)
    return b_x


@triton.jit
def scores(
    b_q, q, valid, k, rows, mapped, factor, cap, CAPPED: tl.constexpr, SIGN: tl.constexpr,
    FORM: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """q k^T of one tile of keys. With a CHUNK, q is read again, so many head dims at a time:
    whole rows of fp32 do not fit the registers that a dot without matrix units takes."""
    if CHUNK == 0:
        b_k = decoded(read(k, rows, mapped, D, BLOCK_D), FORM, b_q.dtype)
        s = dot(b_q, tl.trans(b_k), tl.zeros([b_q.shape[0], b_k.shape[0]], tl.float32))
    else:
        o_c = tl.arange(0, CHUNK)
        s = tl.zeros([q.shape[0], rows.shape[0]], tl.float32)
        for d in tl.range(0, D, CHUNK):
            seen = valid[:, None] & (d + o_c < D)[None, :]
            part = tl.load(q[:, None] + d + o_c[None, :], mask=seen, other=0)
            seen = (d + o_c < D)[None, :]
            if mapped is not None:
                seen = seen & mapped[:, None]
            b_k = tl.load(k + d + rows[:, None] + o_c[None, :], mask=seen, other=0)
            b_k = decoded(b_k, FORM, part.dtype)
            s = dot(part, tl.trans(b_k), s)
    if SIGN != 1:
        s = s * SIGN
    if factor is not None:
        s = s * factor
    if CAPPED:
        s = tanh(s * cap, q.dtype.element_ty == tl.float32)
    return s


@triton.jit
def softmax_step(s, m, l, scale):
    """One tile of an online softmax: p, what to rescale the sums by, the maxima, the sums."""
    m_new = tl.maximum(m, tl.max(s, 1))
    m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)
    p = tl.exp2(s * scale - (m_safe * scale)[:, None])
    alpha = tl.exp2((m - m_safe) * scale)
    return p, alpha, m_new, l * alpha + tl.sum(p, 1)


@triton.jit
def weigh_seen(acc, p, v, seen):
    """acc + p v where a row does not meet the NaN and Inf of values that it does not see."""
    finite = tl.abs(v.to(tl.float32)) < float("inf")
    acc = dot(narrowed(p, v), tl.where(finite, v, 0.0).to(v.dtype), acc)
    if tl.min(tl.min(finite.to(tl.int32), 1), 0) == 0:  # rare, so by key: no registers to spare
        o_n = tl.arange(0, v.shape[0])
        for n in range(0, v.shape[0]):
            value = tl.sum(tl.where((o_n == n)[:, None], v, 0.0).to(tl.float32), 0)[None, :]
            met = tl.max(tl.where((o_n == n)[None, :], seen.to(tl.int32), 0), 1)[:, None]
            worse = (met != 0) & ((value != value) | (tl.abs(value) == float("inf")))
            acc = tl.where(worse, acc + value, acc)
    return acc
