"""What the decode kernel does tile by tile: functions that it inlines.

Scores stay raw (q k^T, capped if there is a softcap), and ``scale`` > 0 turns them into base 2:
p = 2^(scale * (s - max)). A negative softmax scale is q's sign, see ``decode_attention``.
"""

import triton
import triton.language as tl

from .numerics import dot, narrowed, tanh


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
def scores(q, k, factor, cap, CAPPED: tl.constexpr):
    s = dot(q, tl.trans(k), tl.zeros([q.shape[0], k.shape[0]], tl.float32))
    if factor is not None:
        s = s * factor
    if CAPPED:
        s = tanh(s * cap, q.dtype == tl.float32)
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
