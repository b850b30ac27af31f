"""The second kernel of ranked attention: one head of one tile of queries, through its lists.

First the tiles of keys that need no test, then those that do; what is in no list costs nothing.
"""

import triton
import triton.language as tl

from .attention_steps import at_rows, softmax_step
from .numerics import INTERPRETED, LN2, LOG2E, decoded, dot, narrowed, tanh
from .ranked_steps import (
    HEADER,
    PAD,
    VARYING,
    key_ranks,
    lowest_seen,
    pages_of,
    query_ranks,
    request,
    visible,
)


@triton.jit
def load_rows(
    x, place, at, stride, c, real, D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
    LEAN: tl.constexpr,
):  # fmt: skip
    """[BN, WIDTH] of a tile's rows, x + place + at * stride, from dim c on; 0 where not ``real``,
    and past D.

    Of a tile that lies in one piece ``place`` is a number, else both are [BN].
    """
    d = c + tl.arange(0, WIDTH)
    if LEAN:
        rows, real = at_rows(place + at.to(tl.int64) * stride, real, True)
        where = x + rows[:, None] + d[None, :]
    elif place.shape == ():
        where = x + place + ((at.to(tl.int64) * stride)[:, None] + d[None, :])
    else:
        where = x + (place + at * stride)[:, None] + d[None, :]
    if MASKED:
        return tl.load(where, mask=real[:, None] & (d < D)[None, :], other=0)
    elif D % WIDTH != 0:
        return tl.load(where, mask=(d < D)[None, :], other=0)
    else:
        return tl.load(where)


@triton.jit
def place_keys(
    table, b, first, j, real, stride, stride_page, num_pages,
    PAGE_SIZE: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A tile of keys j: page and row where it begins, its rows from there on, which are real.

    In one piece without a table (page 0 is the request) or where a page holds whole tiles.
    """
    o_n = tl.arange(0, BN)
    if PAGE_SIZE == 0:
        return first * 0, first + tl.min(j, 0), o_n, real
    elif PAGE_SIZE % BN == 0:
        row = table + b.to(tl.int64) * stride
        start = tl.min(j, 0)
        page = tl.load(row + start // PAGE_SIZE * stride_page).to(tl.int64)
        if MASKED:
            mapped = (page >= 0) & (page < num_pages)
            page = tl.where(mapped, page, 0)
            real = real & (j * 0 + mapped.to(tl.int32) > 0)
        return page, (start % PAGE_SIZE).to(tl.int64), o_n, real
    else:
        page, mapped = pages_of(table, b, j, real, stride, stride_page, num_pages, PAGE_SIZE)
        return page, tl.zeros([BN], tl.int64), (j % PAGE_SIZE).to(tl.int64), real & mapped


@triton.jit
def bits_of(words, tile, o_m, o_n, BM: tl.constexpr, BN: tl.constexpr):
    """Which of a partial tile's keys o_n the queries see, as ``plan`` noted; 32 bits a word."""
    words += tile * (BM * ((BN + 31) // 32))
    word = tl.load(words + o_m)[:, None]
    if BN > 32:
        word = tl.where((o_n < 32)[None, :], word, tl.load(words + BM + o_m)[:, None])
    return ((word >> (o_n % 32)[None, :]) & 1) != 0


@triton.jit
def tile_scores(
    b_q, p_q, m_q, k, place, at, stride, real, factor, cap, D: tl.constexpr,
    BLOCK_D: tl.constexpr, STEP: tl.constexpr, FORM: tl.constexpr, CAPPED: tl.constexpr,
    MASKED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, LEAN: tl.constexpr,
):  # fmt: skip
    """q k^T of a tile, raw. STEP < BLOCK_D: by pieces of the head, q read again, since an fp32
    product keeps whole rows of both in registers.
    """
    s = tl.zeros([BM, BN], tl.float32)
    for c in tl.static_range(0, BLOCK_D, STEP):
        d = c + tl.arange(0, STEP)
        if STEP < BLOCK_D:
            b_q = tl.load(p_q[:, None] + d[None, :], mask=m_q[:, None] & (d < D)[None, :], other=0)
        b_k = load_rows(k, place, at, stride, c, real, D, STEP, MASKED, LEAN)
        s = dot(b_q, tl.trans(decoded(b_k, FORM, b_q.dtype)), s)
    if factor is not None:
        s = s * factor
    if CAPPED:
        s = tanh(s * cap, b_q.dtype == tl.float32)
    return s


@triton.jit(do_not_specialize=VARYING)
def attend(
    q, k, v, out, lse, lists, words, q_rank, k_rank, table, positions, sinks, k_scale, v_scale,
    queries, keys, cu_q, cu_k, batch, total_q, total_k, longest_q, longest_k, num_pages,
    slots, tiles_q, tiles_k, window, scale, factor, cap, v_factor,
    stride_queries, stride_keys, stride_q_b, stride_q_n, stride_q_h,
    stride_k_b, stride_k_n, stride_k_h, stride_v_b, stride_v_n, stride_v_h,
    stride_out_b, stride_lse_b, stride_lse_h, stride_qr_b, stride_qr_n, stride_kr_b, stride_kr_n,
    stride_table, stride_page, stride_at_b, stride_at_n, stride_ks_b, stride_ks_h,
    stride_vs_b, stride_vs_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PAGE_SIZE: tl.constexpr,
    STRICT: tl.constexpr, WINDOWED: tl.constexpr, MASK: tl.constexpr, CAPPED: tl.constexpr,
    K_FORM: tl.constexpr, V_FORM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CHUNK: tl.constexpr, LEAN: tl.constexpr = False,
):  # fmt: skip
    """out[b, i, h] and lse[b, h, i] of one tile of queries and one head; see ``plan``. LEAN: for
    tiles that fill the registers, see ``at_rows``."""
    # heads that share keys side by side, then tiles, the longest (of causal ranks) first
    pid = tl.program_id(0)
    slot = slots - 1 - pid // GROUP % slots
    h_k = pid // GROUP // slots
    h = h_k * GROUP + pid % GROUP
    row = lists + slot.to(tl.int64) * (tiles_k + HEADER)
    if MASK != 0:
        words += slot.to(tl.int64) * tiles_k * (BM * ((BN + 31) // 32))
    if cu_q is not None:
        b, tile_q = tl.load(row + tiles_k + 2), tl.load(row + tiles_k + 3)
        ours = b < batch
        b = tl.where(ours, b, 0)
    else:
        b, tile_q = slot // tiles_q, slot % tiles_q
    full, partial = tl.load(row + tiles_k), tl.load(row + tiles_k + 1)

    # queries
    o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)
    i = tile_q * BM + o_m
    first_q, m_q = request(b, queries, stride_queries, cu_q, total_q, longest_q)
    first_k, n = request(b, keys, stride_keys, cu_k, total_k, longest_k)
    if cu_q is not None:
        m_q = tl.where(ours, m_q, 0)
    wide = b.to(tl.int64)
    start_q = first_q + tile_q.to(tl.int64) * BM  # offsets from there on stay small
    p_q = q + wide * stride_q_b + start_q * stride_q_n + h.to(tl.int64) * stride_q_h
    p_q += o_m.to(tl.int64) * stride_q_n
    STEP: tl.constexpr = CHUNK if CHUNK < BLOCK_D else BLOCK_D
    b_q = tl.zeros([BM, STEP], q.dtype.element_ty)
    if STEP == BLOCK_D:
        d = tl.arange(0, BLOCK_D)
        b_q = tl.load(
            p_q[:, None] + d[None, :], mask=(i < m_q)[:, None] & (d < D)[None, :], other=0
        )
    k += wide * (stride_k_b if PAGE_SIZE == 0 else 0) + h_k.to(tl.int64) * stride_k_h
    v += wide * (stride_v_b if PAGE_SIZE == 0 else 0) + h_k.to(tl.int64) * stride_v_h
    if k_scale is not None:
        factor *= tl.load(k_scale + b * stride_ks_b + h_k * stride_ks_h)

    # tiles that all see
    m = tl.full([BM], -float("inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BLOCK_DV], tl.float32)
    for t in range(0, full):
        j = tl.load(row + t) * BN + o_n
        page, start, at, real = place_keys(
            table, b, first_k, j, j < n, stride_table, stride_page, num_pages, PAGE_SIZE, BN, False
        )
        s = tile_scores(
            b_q, p_q, i < m_q, k, page * stride_k_b + start * stride_k_n, at, stride_k_n, real,
            factor, cap, D, BLOCK_D, STEP, K_FORM, CAPPED, False, BM, BN, LEAN,
        )  # fmt: skip
        p, alpha, m, l = softmax_step(s, m, l, scale)
        place = page * stride_v_b + start * stride_v_n
        b_v = load_rows(v, place, at, stride_v_n, 0, real, DV, BLOCK_DV, False, LEAN)
        b_v = decoded(b_v, V_FORM, b_q.dtype)
        acc = dot(narrowed(p, b_v), b_v, acc * alpha[:, None])

    # tiles that some see
    rank_i = query_ranks(q_rank, b, first_q, i, m_q, stride_qr_b, stride_qr_n)
    low = tl.zeros([BM], tl.int32)
    if WINDOWED:
        low = lowest_seen(positions, b, first_q, i, m_q, n, window, stride_at_b, stride_at_n)
    bad = tl.zeros([1 if LEAN else BN], tl.int32)
    for t in range(0, partial):
        j = tl.load(row + tiles_k - 1 - t) * BN + o_n
        page, start, at, real = place_keys(
            table, b, first_k, j, j < n, stride_table, stride_page, num_pages, PAGE_SIZE, BN, True
        )
        s = tile_scores(
            b_q, p_q, i < m_q, k, page * stride_k_b + start * stride_k_n, at, stride_k_n, real,
            factor, cap, D, BLOCK_D, STEP, K_FORM, CAPPED, True, BM, BN, LEAN,
        )  # fmt: skip
        if MASK == 0:
            rank_j = key_ranks(k_rank, b, first_k, j, real, stride_kr_b, stride_kr_n)
            sees = visible(rank_i, rank_j, low, j, STRICT, WINDOWED)
        else:
            sees = bits_of(words, tl.min(j, 0) // BN, o_m, o_n, BM, BN)
        p, alpha, m, l = softmax_step(tl.where(sees, s, -float("inf")), m, l, scale)
        place = page * stride_v_b + start * stride_v_n
        b_v = load_rows(v, place, at, stride_v_n, 0, real, DV, BLOCK_DV, True, LEAN)
        b_v = decoded(b_v, V_FORM, b_q.dtype)
        finite = tl.abs(b_v.to(tl.float32)) < float("inf")
        found = tl.max(1 - finite.to(tl.int32), 1)
        if INTERPRETED:  # elsewhere the loop below costs less than this
            found *= tl.max(sees.to(tl.int32), 0)
        if LEAN:
            found = tl.max(found, 0)
        bad = tl.maximum(bad, found)
        b_v = tl.where(finite, b_v, 0.0).to(b_v.dtype)
        acc = dot(narrowed(p, b_v), b_v, acc * alpha[:, None])

    # rows that see a NaN or an infinity of a partial tile meet it here, a key at a time. Rare
    if tl.max(bad, 0) > 0:
        for t in range(0, partial * BN):
            j = tl.load(row + tiles_k - 1 - t // BN) * BN + t % BN + tl.arange(0, 1)
            page, start, at, real = place_keys(
                table, b, first_k, j, j < n, stride_table, stride_page, num_pages, PAGE_SIZE, 1,
                True,
            )  # fmt: skip
            if MASK == 0:
                rank_j = key_ranks(k_rank, b, first_k, j, real, stride_kr_b, stride_kr_n)
                sees = visible(rank_i, rank_j, low, j, STRICT, WINDOWED)
            else:
                sees = bits_of(words, tl.min(j, 0) // BN, o_m, j % BN, BM, BN)
            place = page * stride_v_b + start * stride_v_n
            b_v = load_rows(v, place, at, stride_v_n, 0, real, DV, BLOCK_DV, True, False)
            x = decoded(b_v, V_FORM, b_q.dtype).to(tl.float32)
            acc = tl.where(sees & ~(tl.abs(x) < float("inf")), acc + x, acc)

    # results, base 2 until the lse
    if LEAN:  # numbers of rows made anew, or registers would hold them: no compiler knows full >= 0
        o_m = tl.arange(0, BM) + (full >> 31)
        i = tile_q * BM + o_m
    top = tl.where(m == -float("inf"), m, m * scale)
    if sinks is not None:
        sink = tl.load(sinks + h).to(tl.float32) * LOG2E
        highest = tl.maximum(top, sink)
        base = tl.where(highest == -float("inf"), 0.0, highest)
        shrink = tl.exp2(top - base)
        l = l * shrink + tl.exp2(sink - base)
        acc = acc * shrink[:, None]
    else:
        base = tl.where(top == -float("inf"), 0.0, top)
    if v_scale is not None:
        v_factor *= tl.load(v_scale + b * stride_vs_b + h_k * stride_vs_h)
    valid = (rank_i != PAD) & (i < m_q)
    acc = tl.where((valid & (l != 0))[:, None], acc * (v_factor / l)[:, None], 0.0)
    mine = i < longest_q
    if cu_q is not None:
        owner_of = lists + slots.to(tl.int64) * (tiles_k + HEADER) + start_q
        mine = (i < m_q) & (tl.load(owner_of + o_m, mask=i < m_q, other=-1) == b)
    out += wide * stride_out_b + (start_q * HEADS + h) * DV
    dv = tl.arange(0, BLOCK_DV)
    tl.store(
        out + o_m[:, None] * (HEADS * DV) + dv[None, :],
        acc.to(out.dtype.element_ty),
        mask=mine[:, None] & (dv < DV)[None, :],
    )
    if lse is not None:
        value = tl.where(valid, (base + tl.log2(l)) * LN2, -float("inf"))
        lse += wide * stride_lse_b + h.to(tl.int64) * stride_lse_h + start_q
        tl.store(lse + o_m, value, mask=mine)
