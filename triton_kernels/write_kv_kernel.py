"""The kernel that writes K/V into a cache: rotate k and q, divide by the scales, scatter.

A program takes one row (b, n) and HEADS heads of k, of v or of q. Every product and sum is rounded
by itself (no fused multiply-add), as the reference's are, so that the caches hold its very bits.
"""

import triton
import triton.language as tl

from .cache_slots import slots
from .numerics import encoded, rounded, widened


@triton.jit
def put(to, x, scale, mask, FORM: tl.constexpr):
    """Stores x [HEADS, columns] / scale [HEADS], rounded once; without a scale, of the cache's
    dtype, as it is."""
    if scale is not None:
        x = tl.div_rn(widened(x), tl.broadcast_to(scale[:, None], x.shape))
    if FORM != 0:
        tl.store(to, encoded(widened(x), FORM), mask=mask)
    elif x.dtype == to.dtype.element_ty:
        tl.store(to, x, mask=mask)
    else:
        tl.store(to, rounded(x, to.dtype.element_ty), mask=mask)


@triton.jit
def copy(
    x, to, real, scale, FORM: tl.constexpr, FIRST: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Columns [FIRST, D), as they are but for the scale."""
    COLUMNS: tl.constexpr = triton.next_power_of_2(D - FIRST)
    o = tl.arange(0, COLUMNS)
    mask = real[:, None] & (o < D - FIRST)[None, :]
    put(to[:, None] + (FIRST + o)[None, :], tl.load(x[:, None] + (FIRST + o)[None, :], mask=mask),
        scale, mask, FORM)  # fmt: skip


@triton.jit
def turn(
    x, to, real, scale, cos, sin, FORM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr
):  # fmt: skip
    """Columns [0, 2 HALF): pairs (x1, x2) become (x1 cos - x2 sin, x1 sin + x2 cos)."""
    PAIRS: tl.constexpr = triton.next_power_of_2(HALF)
    o = tl.arange(0, PAIRS)
    c = widened(tl.load(cos + o, mask=o < HALF, other=0))[None, :]
    s = widened(tl.load(sin + o, mask=o < HALF, other=0))[None, :]
    if INTERLEAVED:
        w = tl.arange(0, 2 * PAIRS)
        mask = real[:, None] & (w < 2 * HALF)[None, :]
        both = widened(tl.load(x[:, None] + w[None, :], mask=mask))
        x1, x2 = tl.split(tl.reshape(both, [real.shape[0], PAIRS, 2]))
        both = tl.join(x1 * c - x2 * s, x1 * s + x2 * c)
        both = tl.reshape(both, [real.shape[0], 2 * PAIRS])
        put(to[:, None] + w[None, :], both, scale, mask, FORM)
    else:
        mask = real[:, None] & (o < HALF)[None, :]
        x1 = widened(tl.load(x[:, None] + o[None, :], mask=mask))
        x2 = widened(tl.load(x[:, None] + (HALF + o)[None, :], mask=mask))
        put(to[:, None] + o[None, :], x1 * c - x2 * s, scale, mask, FORM)
        put(to[:, None] + (HALF + o)[None, :], x1 * s + x2 * c, scale, mask, FORM)


@triton.jit
def rotate(
    x, to, real, scale, cos, sin, FORM: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rows x to rows ``to`` (offsets of HEADS rows), rotated where there are cos and sin."""
    if HALF > 0:
        turn(x, to, real, scale, cos, sin, FORM, HALF, INTERLEAVED)
    if 2 * HALF < D:
        copy(x, to, real, scale, FORM, 2 * HALF, D)


@triton.jit
def row_of(x, i, j, h, strides):
    """Pointers to the rows (i, j, h) of k, v or q, or of a cache."""
    return x + i * strides[0] + j * strides[1] + h.to(tl.int64) * strides[2]


@triton.jit
def scale_of(scale, b, h, real, strides, POINTER: tl.constexpr):
    """A cache's scale a head, [HEADS], from a number or a tensor."""
    if POINTER:
        return tl.load(scale + b * strides[0] + h * strides[1], mask=real, other=1.0)
    else:
        return tl.zeros(h.shape, tl.float32) + scale


@triton.jit
def write_values(
    v, v_cache, v_scale, b, n, page, slot, h, H, there, strides, cache_strides, scale_strides,
    POINTER: tl.constexpr, FORM: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    scale = v_scale
    if v_scale is not None:
        scale = scale_of(v_scale, b, h, h < H, scale_strides, POINTER)
    to = row_of(v_cache, page, slot, h, cache_strides)
    copy(row_of(v, b, n, h, strides), to, (h < H) & there, scale, FORM, 0, DV)


@triton.jit
def write_queries(
    q, q_out, cos, sin, row, b, n, h, HQ, strides,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    to = q_out + (row.to(tl.int64) * HQ + h) * D
    x = row_of(q, b, n, h, strides)
    rotate(x, to, h < HQ, None, cos, sin, 0, D, HALF, INTERLEAVED)


@triton.jit(
    do_not_specialize=[
        *("N", "H", "HQ", "k_tiles", "v_tiles", "pages", "page_size", "width"),
        *("stride_at_b", "stride_at_n", "stride_table_b", "stride_table"),
    ]
)
def write(
    k,
    v,
    q,
    k_cache,
    v_cache,
    q_out,
    positions,
    block_table,
    cos,
    sin,
    k_scale,
    v_scale,
    N,
    H,
    HQ,
    k_tiles,
    v_tiles,
    pages,
    page_size,
    width,
    stride_at_b,
    stride_at_n,
    stride_table_b,
    stride_table,
    k_scale_strides,
    v_scale_strides,
    cos_strides,
    sin_strides,
    k_strides,
    v_strides,
    q_strides,
    k_cache_strides,
    v_cache_strides,
    D: tl.constexpr,
    DV: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    K_FORM: tl.constexpr,
    V_FORM: tl.constexpr,
    K_POINTER: tl.constexpr,
    V_POINTER: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Program (row, tile): tiles of k first, then of v, then of q. Strides of k, v, q are of b, n
    and head, of caches page, slot and head; q_out is contiguous. A scale of None is 1."""
    row, tile = tl.program_id(0), tl.program_id(1)
    b, n = (row // N).to(tl.int64), (row % N).to(tl.int64)
    h = tile * HEADS + tl.arange(0, HEADS)
    at = tl.load(positions + b * stride_at_b + n * stride_at_n).to(tl.int64)
    if block_table is not None:
        block_table += b * stride_table_b
    page, slot, there = slots(
        at, True, b, block_table, stride_table, pages, page_size, width
    )  # fmt: skip
    if cos is not None:
        cos += b * cos_strides[0] + n * cos_strides[1]
        sin += b * sin_strides[0] + n * sin_strides[1]
    if tile < k_tiles:
        x = row_of(k, b, n, h, k_strides)
        to = row_of(k_cache, page, slot, h, k_cache_strides)
        scale = k_scale
        if k_scale is not None:
            scale = scale_of(k_scale, b, h, h < H, k_scale_strides, K_POINTER)
        rotate(x, to, (h < H) & there, scale, cos, sin, K_FORM, D, HALF, INTERLEAVED)
    elif tile < k_tiles + v_tiles:
        write_values(
            v, v_cache, v_scale, b, n, page, slot, h - k_tiles * HEADS, H, there, v_strides,
            v_cache_strides, v_scale_strides, V_POINTER, V_FORM, DV,
        )  # fmt: skip
    elif q is not None:
        write_queries(
            q, q_out, cos, sin, row, b, n, h - (k_tiles + v_tiles) * HEADS, HQ, q_strides,
            D, HALF, INTERLEAVED,
        )  # fmt: skip
