"""Pieces of arithmetic that the attention kernels share."""

import triton
import triton.language as tl
from triton import knobs

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))

E4M3, E5M2 = tl.constexpr(1), tl.constexpr(2)  # how a cache of bytes is to be read; 0: as it is


def power_of_two(n: int) -> int:
    """The next one; Triton's own costs 2 us."""
    return 1 << max(n - 1, 0).bit_length()


@triton.jit
def dot(a, b, acc):
    """acc + a b, fp32 IEEE for fp32 inputs. The interpreter gives garbage for bf16, so widen."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrowed(p, like):
    """Probabilities at the dtype of the values that they weigh."""
    if INTERPRETED and like.dtype == tl.bfloat16:  # whose cast to bf16 cuts off
        return p
    return p.to(like.dtype)


@triton.jit
def tanh(x, ACCURATE: tl.constexpr):
    """To 1e-7 of 1, or with ACCURATE of itself: there a polynomial for |x| < 0.625."""
    y = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))
    if ACCURATE:
        z = x * x
        p = -0.005704972123713358 * z + 0.02063907136439297
        p = p * z - 0.053739709056431904
        p = p * z + 0.13331442103533833
        p = p * z - 0.3333328193699392
        y = tl.where(z < 0.390625, x + x * z * p, y)
    return y


@triton.jit
def decoded(x, FORM: tl.constexpr, dtype: tl.constexpr):
    """fp8 bytes as ``dtype``, exactly, by integer operations that every architecture has.

    e5m2 is the upper byte of an fp16. e4m3's bits, moved into an fp16's place, are 2**-8 of it,
    also below its normal numbers; 0x7f and 0xff are NaN, and there are no infinities.
    """
    if FORM == 0:
        return x
    bits = x.to(tl.uint16)
    if FORM == 2:
        half = (bits << 8).to(tl.float16, bitcast=True)
    else:
        size = bits & 0x7F
        sign = (bits & 0x80) << 8
        small = ((size << 7) | sign).to(tl.float16, bitcast=True)
        half = tl.where(size == 0x7F, float("nan"), (small * 256.0).to(tl.float16))
    if dtype == tl.float16:
        return half.to(tl.float16)
    return half.to(tl.float32).to(dtype)


@triton.jit
def encoded(x, FORM: tl.constexpr):
    """fp32 as fp8 bytes: the nearest code, ties to the even one, saturated to the largest finite.

    By integer operations, so also where the hardware has no such cast. NaN stays one, with its
    sign. A number below the smallest normal code is added to one whose last place is the smallest
    code's: the sum's rounding is the code's.
    """
    if FORM == 1:  # e4m3
        DROPPED: tl.constexpr = 20  # of fp32's 23 bits of mantissa
        REBIAS: tl.constexpr = 127 - 7
        LARGEST: tl.constexpr = 0x43E00000  # 448
        NAN: tl.constexpr = 0x7F
    else:
        DROPPED: tl.constexpr = 21
        REBIAS: tl.constexpr = 127 - 15
        LARGEST: tl.constexpr = 0x47600000  # 57344
        NAN: tl.constexpr = 0x7F
    bits = x.to(tl.int32, bitcast=True)
    sign, size = (bits >> 24) & 0x80, bits & 0x7FFFFFFF
    nan = size > 0x7F800000
    size = tl.minimum(size, LARGEST)
    odd = (size >> DROPPED) & 1
    normal = (size + odd + ((1 << (DROPPED - 1)) - 1) - (REBIAS << 23)) >> DROPPED
    STEP: tl.constexpr = (REBIAS + 1 + DROPPED) << 23  # the number whose last place is a code's
    step = tl.full(size.shape, STEP, tl.int32).to(tl.float32, bitcast=True)
    small = (size.to(tl.float32, bitcast=True) + step).to(tl.int32, bitcast=True) - STEP
    code = tl.where(size < ((REBIAS + 1) << 23), small, normal)
    return (sign | tl.where(nan, NAN, code)).to(tl.uint8)


@triton.jit
def widened(x):
    """As fp32, exactly; the interpreter's cast from bf16 takes denormals for others."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 as ``dtype``, to the nearest; the interpreter's cast to bf16 cuts off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        near = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        near = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, near)
        return near.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)
