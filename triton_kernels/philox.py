"""The draws of ``pydecode.philox``, bit for bit."""

import triton
import triton.language as tl

from .numerics import LOG2E

# the streams of pydecode.philox
DRAFT, ACCEPT, RESAMPLE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
COMMIT, RANDOM_CONFIDENCE = tl.constexpr(3), tl.constexpr(4)


@triton.jit
def key_of(seed, b, PER_REQUEST: tl.constexpr):
    """Request b's 64-bit seed: a [B] seed as it is, a scalar one with b added to its high word."""
    key = tl.zeros([], tl.int64) + seed
    if not PER_REQUEST:
        key += b.to(tl.int64) << 32
    return key


@triton.jit
def words(STREAM: tl.constexpr, key, offset, position, index):
    """x0..x3 of counters (index, position, offset, stream), all int64 scalars but ``index``."""
    c0 = (index & 0xFFFFFFFF).to(tl.uint32)
    nothing = c0 * 0
    c1 = nothing + (position & 0xFFFFFFFF).to(tl.uint32)
    c2 = nothing + (offset & 0xFFFFFFFF).to(tl.uint32)
    c3 = nothing + ((offset >> 32 & 0xFFFFFF) | (STREAM << 24)).to(tl.uint32)
    return tl.philox(key.to(tl.uint64), c0, c1, c2, c3)


@triton.jit
def uniform(STREAM: tl.constexpr, key, offset, position, index):
    """u in [0, 1), a multiple of 2**-24; of int64 ``index``, a tensor or a scalar."""
    x0, _, _, _ = words(STREAM, key, offset, position, index)
    return (x0 >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def chunk_gumbel(STREAM: tl.constexpr, key, offset, position, start, CHUNK: tl.constexpr):
    """Noise of the entries [start, start + CHUNK), multiples of 4: a counter for four of them."""
    index = (start // 4 + tl.arange(0, CHUNK // 4)).to(tl.int64)
    x0, x1, x2, x3 = words(STREAM, key, offset, position, index)
    x = tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [CHUNK])
    return gumbel_of(x)


@triton.jit
def gumbel_at(STREAM: tl.constexpr, key, offset, position, index):
    """``chunk_gumbel`` of any entries: a counter each, of whose four words they take one."""
    x0, x1, x2, x3 = words(STREAM, key, offset, position, (index // 4).to(tl.int64))
    word = index % 4
    return gumbel_of(tl.where(word < 2, tl.where(word == 0, x0, x1), tl.where(word == 2, x2, x3)))


@triton.jit
def gumbel_of(x):
    """A word as Gumbel noise."""
    # 1 - u' rounds to 1 for small u', and u' to 1 for large ones: take the side that is exact
    upper = x >= 2147483648
    rest = ((0xFFFFFFFF - x).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    below = (x.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    small = -log1p_of_minus(below)
    exponential = tl.where(upper, -tl.log2(rest) / LOG2E, small)
    return -tl.log2(exponential) / LOG2E


@triton.jit
def log1p_of_minus(x):
    """log(1 - x) for x in (0, 1/2], to fp32 relative precision near 0 too."""
    y = 1.0 - x
    # Goldberg's correction: what rounding took from y is given back as a factor
    return tl.where(y == 1.0, -x, (tl.log2(y) / LOG2E) * (x / (1.0 - y)))
