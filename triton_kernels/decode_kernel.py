"""The decode kernel: rows in flight over a cached context and a small mask among themselves.

One kernel for tree, block and branch attention. Rows in flight and the query heads of a KV head
make one M dimension (row-major), so that K and V are read once. A program takes one tile of M and
one of SPLITS parts of the context, whose boundaries are whole tiles of the request's own length:
first the context's full tiles without a test, then its edges (start, hole, end, window), then, in
the last split, the rows in flight under packed bits, half a 64-bit word or less a tile. With
splits a second kernel combines the partial results in index order.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .attention_steps import (
    at_rows,
    clamp,
    number_of,
    ones,
    place,
    place_full,
    read,
    scores,
    softmax_step,
    weigh_seen,
)
from .decode_combine import claimed, finish
from .numerics import LN2, LOG2E, decoded, dot, narrowed

# what a server changes must not recompile in the middle of serving
VARYING = [
    *("length", "hole", "first", "count", "branches", "rows", "branch_length", "total"),
    *("num_pages", "max_pages", "m_tiles", "window", "stride_table", "stride_mask_b"),
    *("stride_mask_n", "stride_at_b", "stride_at_c", "stride_at_n"),
]


class Shape(NamedTuple):
    """What a binary of the kernel is compiled for, in one argument: each costs host time."""

    HKV: int
    G: int  # query heads of a KV head
    D: int
    DV: int
    PAGE: int
    K_FORM: int  # of the bytes in an fp8 cache, see ``numerics.decoded``
    V_FORM: int
    K_POINTER: bool  # k_scale is a tensor
    V_POINTER: bool
    BLOCK: bool  # holes and starts, as block attention has them; else a tree's context
    BRANCHED: bool
    CAUSAL: bool
    WINDOWED: bool
    CAPPED: bool
    SIGN: int  # of the softmax scale
    SPLITS: int
    BLOCK_D: int
    BLOCK_DV: int


@triton.jit(do_not_specialize=VARYING)
def decode(
    q, k_cache, v_cache, k_rows, v_rows, out, lse, part_out, part_lse,
    mask, at, table, sinks, cu, causal_of,
    length, hole, first, count, branches, k_scale, v_scale, scale, cap,
    rows, branch_length, total, num_pages, max_pages, m_tiles, window,
    stride_table, stride_mask_b, stride_mask_n, stride_at_b, stride_at_c, stride_at_n,
    strides, S: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr = 0,
    LEAN: tl.constexpr = False,
):  # fmt: skip
    """q's rows are ``rows`` of a request, in BRANCHED calls ``branch_length`` a branch. LEAN: for
    tiles that fill the registers, see ``at_rows``; and full tiles pass for edges, or the numbers
    of both loops would be held."""
    (
        stride_length, stride_hole, stride_first, stride_count, stride_branches, stride_causal,
        stride_ks_b, stride_ks_h, stride_vs_b, stride_vs_h,
        stride_q_b, stride_q_c, stride_q_n, stride_q_h,
        stride_k_p, stride_k_s, stride_k_h, stride_v_p, stride_v_s, stride_v_h,
        stride_rk_b, stride_rk_c, stride_rk_n, stride_rk_h,
        stride_rv_b, stride_rv_c, stride_rv_n, stride_rv_h,
    ) = strides  # fmt: skip
    BL: tl.constexpr = BN if BN < 32 else 32  # no whole word of bits a tile: registers are short
    TILES: tl.constexpr = 64 // BL  # that a word has
    tile = tl.program_id(0)
    m_tile, tile = tile % m_tiles, tile // m_tiles
    split, tile = tile % S.SPLITS, tile // S.SPLITS
    h, b = tile % S.HKV, (tile // S.HKV).to(tl.int64)

    # ---- this program's rows
    o_m = m_tile * BM + tl.arange(0, BM)
    r, head = o_m // S.G, h * S.G + o_m % S.G
    inside = r < rows
    row0 = b * rows
    if cu is not None:  # [row0, row1) of a packed batch; nothing unless it lies in [0, total]
        row0, row1 = tl.load(cu + b).to(tl.int64), tl.load(cu + b + 1).to(tl.int64)
        good = (row0 >= 0) & (row0 <= row1) & (row1 <= total)
        n = tl.where(good, tl.minimum(row1 - row0, rows), 0).to(tl.int32)
        row0 = tl.where(good, row0, 0)
    else:
        n = clamp(number_of(count, b, stride_count), 0, branch_length).to(tl.int32)
    c, i = tl.zeros_like(r), r
    n_branches = 1
    if S.BRANCHED:
        c, i = r // branch_length, r % branch_length
        n_branches = number_of(branches, b, stride_branches)
    valid = inside & (i < n) & (c < n_branches)
    token = row0 + r
    if cu is not None:  # a row of two requests belongs to the first one
        valid = valid & ~claimed(token, cu, b, rows, total)
        inside = valid
    q_at = b * stride_q_b + c.to(tl.int64) * stride_q_c + i.to(tl.int64) * stride_q_n
    if cu is not None:
        q_at = token * stride_q_n
    o_d, o_v = tl.arange(0, S.BLOCK_D), tl.arange(0, S.BLOCK_DV)
    q_at = q + (q_at + head * stride_q_h)
    b_q = None
    if CHUNK == 0:
        b_q = tl.load(
            q_at[:, None] + o_d[None, :], mask=valid[:, None] & (o_d < S.D)[None, :], other=0
        )
    dtype: tl.constexpr = q.dtype.element_ty

    # ---- what they see of the cache: [low, stop) less [hole_low, hole_high)
    capacity = max_pages * S.PAGE
    own = number_of(length, b, stride_length)
    stop, low, start = own, tl.full([], 0, tl.int32), own
    is_causal = S.CAUSAL
    if causal_of is not None:
        is_causal = tl.load(causal_of + b * stride_causal) != 0
    if S.BLOCK:
        start = number_of(hole, b, stride_hole)
        start = tl.where(start >= 0, start, own)
        low = clamp(number_of(first, b, stride_first), 0, capacity).to(tl.int32)
        if S.WINDOWED:
            stop = tl.minimum(own, start)
        elif causal_of is not None or S.CAUSAL:
            stop = tl.where(is_causal, tl.minimum(own, start), own)
    anyone = tl.max(valid.to(tl.int32), 0)
    stop = clamp(stop, 0, capacity).to(tl.int32) * anyone
    hole_low = clamp(start, 0, capacity).to(tl.int32)
    hole_high = clamp(start + n, 0, capacity).to(tl.int32)
    low_all, lowest = low, tl.zeros_like(r)
    if mask is not None:
        words = mask + b * stride_mask_b + r.to(tl.int64) * stride_mask_n
        if cu is not None:
            words = mask + token * stride_mask_n
    if S.WINDOWED:
        floor = tl.zeros_like(token) + start
        if at is not None:
            where = b * stride_at_b + c * stride_at_c + i * stride_at_n
            if cu is not None:
                where = token * stride_at_n
            floor = tl.load(at + where, mask=valid, other=0).to(tl.int64) + 1
        elif S.BLOCK:
            floor += tl.where(is_causal, i + 1, 0)
        elif mask is not None:  # its ancestors: the rows that it sees, less itself
            for w in range(0, (n + 63) // 64):
                word = tl.load(words + w, mask=valid, other=0)
                left = n - w * 64
                if left < 64:
                    word = word & ((tl.full([], 1, tl.int64) << left) - 1)
                itself = tl.where(r // 64 == w, (word >> (r % 64)) & 1, 0)
                floor += ones(word) - itself
            floor += 1
        else:
            floor += tl.where(is_causal, i, 0) + 1
        lowest = clamp(floor - window, 0, capacity).to(tl.int32)
        low_all = tl.maximum(low, tl.max(tl.where(valid, lowest, 0), 0))
        low = tl.maximum(low, tl.min(tl.where(valid, lowest, capacity), 0))

    # ---- its tiles: s0 .. s1 of all; full ones and, between them, runs of edges
    t0 = low // BN
    t1 = tl.maximum(tl.cdiv(stop, BN), t0)
    per = tl.maximum(tl.cdiv(t1 - t0, S.SPLITS), 4)
    s0 = tl.minimum(t0 + split * per, t1)
    s1 = tl.minimum(s0 + per, t1)
    f0 = clamp(tl.cdiv(low_all, BN), s0, s1)
    f1 = clamp(stop // BN, f0, s1)
    e0, e1, g0, g1 = s1, s1, s1, s1
    if LEAN:
        f0, f1 = s1, s1
    elif S.BLOCK:
        f1 = clamp(tl.minimum(hole_low, stop) // BN, f0, s1)
        e0 = clamp(tl.cdiv(tl.minimum(hole_low, stop), BN), f1, s1)
        e1 = clamp(hole_high // BN, e0, s1)
        g0 = clamp(tl.cdiv(tl.maximum(hole_high, low_all), BN), e1, s1)
        g1 = clamp(stop // BN, g0, s1)
    full = f1 - f0 + g1 - g0
    edges0 = f0 - s0
    edges1 = edges0 + e0 - f1
    edges2 = edges1 + g0 - e1
    edges = edges2 + s1 - g1

    m = tl.full([BM], -float("inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    BLOCK_DV: tl.constexpr = S.BLOCK_DV  # Triton 3.6 takes no field of S in a list
    acc = tl.zeros([BM, BLOCK_DV], tl.float32)
    k_factor = k_scale
    if S.K_POINTER:
        k_factor = tl.load(k_scale + b * stride_ks_b + h * stride_ks_h)
    o_n = tl.arange(0, BN)
    k_head = k_cache + h.to(tl.int64) * stride_k_h
    v_head = v_cache + h.to(tl.int64) * stride_v_h
    if table is not None:
        table += b * stride_table

    for j in tl.range(0, full):
        t = j + tl.where(j < f1 - f0, f0, g0 - (f1 - f0))
        page, slot, live = place_full(t, o_n, table, b, num_pages, S.PAGE, BN)
        mapped = live
        if table is None:
            mapped = None
        at_k = page * stride_k_p + slot * stride_k_s
        b_s = scores(
            b_q, q_at, valid, k_head, at_k, mapped, k_factor, cap,
            S.CAPPED, S.SIGN, S.K_FORM, S.D, S.BLOCK_D, CHUNK,
        )  # fmt: skip
        if mapped is not None:
            b_s = tl.where(mapped[None, :], b_s, -float("inf"))
        b_p, alpha, m, l = softmax_step(b_s, m, l, scale)
        b_v = read(v_head, page * stride_v_p + slot * stride_v_s, mapped, S.DV, S.BLOCK_DV)
        b_v = decoded(b_v, S.V_FORM, dtype)
        acc = dot(narrowed(b_p, b_v), b_v, acc * alpha[:, None])

    for j in tl.range(0, edges, num_stages=1):
        t = tl.where(j < edges0, s0 + j, tl.where(j < edges1, f1 + j - edges0, 0))
        t = tl.where(j < edges1, t, tl.where(j < edges2, e1 + j - edges1, g1 + j - edges2))
        o_k = t * BN + o_n
        seen = (o_k >= low) & (o_k < stop)
        if S.BLOCK:
            seen = seen & ((o_k < hole_low) | (o_k >= hole_high))
        page, slot, seen = place(o_k, table, seen, b, num_pages, S.PAGE)
        at_k, mapped = at_rows(page * stride_k_p + slot * stride_k_s, seen, LEAN)
        b_s = scores(
            b_q, q_at, valid, k_head, at_k, mapped, k_factor, cap,
            S.CAPPED, S.SIGN, S.K_FORM, S.D, S.BLOCK_D, CHUNK,
        )  # fmt: skip
        sees = seen[None, :]
        if S.WINDOWED:
            sees = sees & (o_k[None, :] >= lowest[:, None])
        b_p, alpha, m, l = softmax_step(tl.where(sees, b_s, -float("inf")), m, l, scale)
        at_v, mapped = at_rows(page * stride_v_p + slot * stride_v_s, seen, LEAN)
        b_v = read(v_head, at_v, mapped, S.DV, S.BLOCK_DV)
        b_v = decoded(b_v, S.V_FORM, dtype)
        if S.WINDOWED:
            acc = weigh_seen(acc * alpha[:, None], b_p, b_v, sees)
        else:
            acc = dot(narrowed(b_p, b_v), b_v, acc * alpha[:, None])

    v_factor = v_scale
    if v_scale is not None:
        if S.V_POINTER:
            v_factor = tl.load(v_scale + b * stride_vs_b + h * stride_vs_h)
        if k_rows is not None:
            acc = acc * v_factor

    # ---- the rows in flight
    j0, j1 = n * 0, n
    if S.BRANCHED:  # those of the tile's branches
        j0 = tl.min(tl.where(valid, c, rows), 0) * branch_length
        j1 = (tl.max(tl.where(valid, c, -1), 0) + 1) * branch_length
    if causal_of is None and S.CAUSAL:
        j1 = tl.minimum(j1, tl.max(r, 0) + 1)
    if (split < S.SPLITS - 1) | (anyone == 0):
        j0, j1 = j0 * 0, j1 * 0
    for t in tl.range(j0 // BL, tl.cdiv(j1, BL), num_stages=1):
        o_j = t * BL + tl.arange(0, BL)
        c_j, i_j = tl.zeros_like(o_j), o_j
        if S.BRANCHED:
            c_j, i_j = o_j // branch_length, o_j % branch_length
        seen = (i_j < n) & (c_j < n_branches) & (o_j < rows)
        if k_rows is not None:
            k_at = b * stride_rk_b + c_j.to(tl.int64) * stride_rk_c + i_j.to(tl.int64) * stride_rk_n
            v_at = b * stride_rv_b + c_j.to(tl.int64) * stride_rv_c + i_j.to(tl.int64) * stride_rv_n
            if cu is not None:
                k_at, v_at = (row0 + o_j) * stride_rk_n, (row0 + o_j) * stride_rv_n
            k_at, mapped = at_rows(k_at, seen, LEAN)
            b_s = scores(
                b_q, q_at, valid, k_rows + h * stride_rk_h, k_at, mapped, None, cap,
                S.CAPPED, S.SIGN, 0, S.D, S.BLOCK_D, CHUNK,
            )  # fmt: skip
        else:
            o_k = start + o_j
            seen = seen & (o_k >= 0) & (o_k < capacity)
            page, slot, seen = place(o_k, table, seen, b, num_pages, S.PAGE)
            v_at = page * stride_v_p + slot * stride_v_s
            k_at, mapped = at_rows(page * stride_k_p + slot * stride_k_s, seen, LEAN)
            b_s = scores(
                b_q, q_at, valid, k_head, k_at, mapped, k_factor, cap,
                S.CAPPED, S.SIGN, S.K_FORM, S.D, S.BLOCK_D, CHUNK,
            )  # fmt: skip
        sees = seen[None, :] & valid[:, None]
        if mask is not None:
            word = tl.load(words + t // TILES, mask=valid, other=0) >> (t % TILES * BL)
            sees = sees & (((word.to(tl.int32)[:, None] >> (o_j % BL)[None, :]) & 1) != 0)
        if S.BRANCHED:
            sees = sees & (c[:, None] == c_j[None, :])
        if causal_of is not None:
            sees = sees & ((i[:, None] >= i_j[None, :]) | ~is_causal)
        elif S.CAUSAL:
            sees = sees & (i[:, None] >= i_j[None, :])
        b_p, alpha, m, l = softmax_step(tl.where(sees, b_s, -float("inf")), m, l, scale)
        v_at, mapped = at_rows(v_at, seen, LEAN)
        if k_rows is not None:
            b_v = read(v_rows + h * stride_rv_h, v_at, mapped, S.DV, S.BLOCK_DV)
        else:
            b_v = decoded(read(v_head, v_at, mapped, S.DV, S.BLOCK_DV), S.V_FORM, dtype)
        acc = weigh_seen(acc * alpha[:, None], b_p, b_v, sees)
    if v_scale is not None and k_rows is None:
        acc = acc * v_factor

    # ---- results. Numbers of rows made anew, or registers would hold them all through the loops:
    # ``anyone`` is 0 or 1, which compilers do not know
    o_m = (m_tile + (anyone >> 1)) * BM + tl.arange(0, BM)
    r, head = o_m // S.G, h * S.G + o_m % S.G
    c, i, token = tl.zeros_like(r), r, row0 + r
    if S.BRANCHED:
        c, i = r // branch_length, r % branch_length
    if LEAN and cu is None:
        inside = r < rows
    HQ: tl.constexpr = S.HKV * S.G
    o_row = (token * HQ + head).to(tl.int64)
    o_lse = ((b * (rows // branch_length) + c) * HQ + head) * branch_length + i
    if cu is not None:
        o_lse = head.to(tl.int64) * total + token
    m = m * scale
    v_mask = inside[:, None] & (o_v < S.DV)[None, :]
    if S.SPLITS == 1:
        sink = None
        if sinks is not None:
            sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        b_o, b_lse = finish(m, l, acc, sink)
        b_o = tl.where(valid[:, None], b_o, 0.0)
        tl.store(out + o_row[:, None] * S.DV + o_v[None, :], b_o.to(out.dtype.element_ty), v_mask)
        if lse is not None:
            tl.store(lse + o_lse, tl.where(valid, b_lse * LN2, -float("inf")), inside)
    else:
        b_o, b_lse = finish(m, l, acc, None)
        o_part = o_row * S.SPLITS + split
        v_mask = v_mask & (l != 0)[:, None]  # an empty part is known by its lse
        tl.store(part_out + o_part[:, None] * S.DV + o_v[None, :], b_o, v_mask)
        # +inf: past num_tokens or num_branches
        b_lse = tl.where(valid, b_lse, float("inf"))
        tl.store(part_lse + o_part, b_lse, inside)
