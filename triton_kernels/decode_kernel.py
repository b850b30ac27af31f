"""The decode kernel: rows in flight over a cached context and a small mask among themselves.

One kernel for tree, block and branch attention. Rows in flight and the query heads of a KV head
make one M dimension (row-major), so that K and V are read once. A program takes one tile of M and
one of SPLITS parts of the context, whose boundaries are whole tiles of the request's own length:
first the context's full tiles without a test, then its edges (start, hole, end, window), then, in
the last split, the rows in flight under packed bits, one 64-bit word a tile. With splits a second
kernel combines the partial results in index order.
"""

import triton
import triton.language as tl

from .attention_steps import clamp, number_of, ones, scores, softmax_step, weigh_seen
from .numerics import LN2, LOG2E, decoded, dot, narrowed

# what a server changes must not recompile in the middle of serving
VARYING = [
    *("length", "hole", "first", "count", "branches", "rows", "branch_length", "total"),
    *("num_pages", "max_pages", "m_tiles", "window", "stride_table", "stride_mask_b"),
    *("stride_mask_n", "stride_at_b", "stride_at_c", "stride_at_n"),
]


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
def read(x, rows, mapped, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BN, BLOCK_D] from row offsets; 0 where not mapped (None: all are) and past D."""
    o_d = tl.arange(0, BLOCK_D)
    pointers = x + rows[:, None] + o_d[None, :]
    if mapped is None and D == BLOCK_D:
        b_x = tl.load(pointers)
    elif mapped is None:
        b_x = tl.load(pointers, mask=(o_d < D)[None, :], other=0)
    elif D == BLOCK_D:
        b_x = tl.load(pointers, mask=mapped[:, None], other=0)
    else:
        b_x = tl.load(pointers, mask=mapped[:, None] & (o_d < D)[None, :], other=0)
    return b_x


@triton.jit
def finish(m, l, acc, sink):
    """out and base-2 lse of sums whose base-2 maxima are m; a sink is one more logit."""
    top = m
    if sink is not None:
        top = tl.maximum(m, sink)
    top = tl.where(top == -float("inf"), 0.0, top)
    if sink is not None:
        shrink = tl.exp2(m - top)
        l = l * shrink + tl.exp2(sink - top)
        acc = acc * shrink[:, None]
    some = tl.where(l == 0, 1.0, l)
    return acc / some[:, None], tl.where(l == 0, -float("inf"), top + tl.log2(some))


@triton.jit(do_not_specialize=VARYING)
def decode(
    q, k_cache, v_cache, k_rows, v_rows, out, lse, part_out, part_lse,
    mask, at, table, sinks, cu, causal_of,
    length, hole, first, count, branches, k_scale, v_scale, scale, cap,
    rows, branch_length, total, num_pages, max_pages, m_tiles, window,
    stride_length, stride_hole, stride_first, stride_count, stride_branches, stride_causal,
    stride_ks_b, stride_ks_h, stride_vs_b, stride_vs_h,
    stride_table, stride_mask_b, stride_mask_n, stride_at_b, stride_at_c, stride_at_n,
    stride_q_b, stride_q_c, stride_q_n, stride_q_h,
    stride_k_p, stride_k_s, stride_k_h, stride_v_p, stride_v_s, stride_v_h,
    stride_rk_b, stride_rk_c, stride_rk_n, stride_rk_h,
    stride_rv_b, stride_rv_c, stride_rv_n, stride_rv_h,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    K_FORM: tl.constexpr, V_FORM: tl.constexpr, BLOCK: tl.constexpr, BRANCHED: tl.constexpr,
    K_POINTER: tl.constexpr, V_POINTER: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SIGN: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """See the module. BLOCK: holes and starts as block attention has them; else a tree's context.
    q's rows are ``rows`` of a request, in BRANCHED calls ``branch_length`` a branch."""
    BL: tl.constexpr = 32  # half a word of packed bits a tile: registers are short
    tile = tl.program_id(0)
    m_tile, tile = tile % m_tiles, tile // m_tiles
    split, tile = tile % SPLITS, tile // SPLITS
    h, b = tile % HKV, (tile // HKV).to(tl.int64)

    # ---- this program's rows
    o_m = m_tile * BM + tl.arange(0, BM)
    r, head = o_m // G, h * G + o_m % G
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
    if BRANCHED:
        c, i = r // branch_length, r % branch_length
        n_branches = number_of(branches, b, stride_branches)
    valid = inside & (i < n) & (c < n_branches)
    if cu is not None:  # a row of two requests belongs to the first one
        for b0 in range(0, b):
            a0, a1 = tl.load(cu + b0).to(tl.int64), tl.load(cu + b0 + 1).to(tl.int64)
            a1 = tl.where((a0 >= 0) & (a1 <= total), tl.minimum(a1, a0 + rows), a0)
            valid = valid & ((row0 + r < a0) | (row0 + r >= a1))
        inside = valid
    token = row0 + r
    q_at = b * stride_q_b + c.to(tl.int64) * stride_q_c + i.to(tl.int64) * stride_q_n
    if cu is not None:
        q_at = token * stride_q_n
    o_d, o_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q_at = q + (q_at + head * stride_q_h)[:, None] + o_d[None, :]
    b_q = tl.load(q_at, mask=valid[:, None] & (o_d < D)[None, :], other=0)
    if SIGN != 1:
        b_q = (b_q * SIGN).to(b_q.dtype)

    # ---- what they see of the cache: [low, stop) less [hole_low, hole_high)
    capacity = max_pages * PAGE
    own = number_of(length, b, stride_length)
    stop, low, start = own, tl.full([], 0, tl.int32), own
    is_causal = CAUSAL
    if causal_of is not None:
        is_causal = tl.load(causal_of + b * stride_causal) != 0
    if BLOCK:
        start = number_of(hole, b, stride_hole)
        start = tl.where(start >= 0, start, own)
        low = clamp(number_of(first, b, stride_first), 0, capacity).to(tl.int32)
        if WINDOWED:
            stop = tl.minimum(own, start)
        elif causal_of is not None or CAUSAL:
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
    if WINDOWED:
        floor = tl.zeros_like(token) + start
        if at is not None:
            where = b * stride_at_b + c * stride_at_c + i * stride_at_n
            if cu is not None:
                where = token * stride_at_n
            floor = tl.load(at + where, mask=valid, other=0).to(tl.int64) + 1
        elif BLOCK:
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
    per = tl.maximum(tl.cdiv(t1 - t0, SPLITS), 4)
    s0 = tl.minimum(t0 + split * per, t1)
    s1 = tl.minimum(s0 + per, t1)
    f0 = clamp(tl.cdiv(low_all, BN), s0, s1)
    f1 = clamp(stop // BN, f0, s1)
    e0, e1, g0, g1 = s1, s1, s1, s1
    if BLOCK:
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
    acc = tl.zeros([BM, BLOCK_DV], tl.float32)
    k_factor = k_scale
    if K_POINTER:
        k_factor = tl.load(k_scale + b * stride_ks_b + h * stride_ks_h)
    o_n = tl.arange(0, BN)
    k_head = k_cache + h.to(tl.int64) * stride_k_h
    v_head = v_cache + h.to(tl.int64) * stride_v_h
    if table is not None:
        table += b * stride_table

    for j in tl.range(0, full):
        t = j + tl.where(j < f1 - f0, f0, g0 - (f1 - f0))
        page, slot, live = place_full(t, o_n, table, b, num_pages, PAGE, BN)
        mapped = live
        if table is None:
            mapped = None
        b_k = read(k_head, page * stride_k_p + slot * stride_k_s, mapped, D, BLOCK_D)
        b_s = scores(b_q, decoded(b_k, K_FORM, b_q.dtype), k_factor, cap, CAPPED)
        if mapped is not None:
            b_s = tl.where(mapped[None, :], b_s, -float("inf"))
        b_p, alpha, m, l = softmax_step(b_s, m, l, scale)
        b_v = read(v_head, page * stride_v_p + slot * stride_v_s, mapped, DV, BLOCK_DV)
        b_v = decoded(b_v, V_FORM, b_q.dtype)
        acc = dot(narrowed(b_p, b_v), b_v, acc * alpha[:, None])

    for j in tl.range(0, edges, num_stages=1):
        t = tl.where(j < edges0, s0 + j, tl.where(j < edges1, f1 + j - edges0, 0))
        t = tl.where(j < edges1, t, tl.where(j < edges2, e1 + j - edges1, g1 + j - edges2))
        o_k = t * BN + o_n
        seen = (o_k >= low) & (o_k < stop)
        if BLOCK:
            seen = seen & ((o_k < hole_low) | (o_k >= hole_high))
        page, slot, seen = place(o_k, table, seen, b, num_pages, PAGE)
        b_k = read(k_head, page * stride_k_p + slot * stride_k_s, seen, D, BLOCK_D)
        b_s = scores(b_q, decoded(b_k, K_FORM, b_q.dtype), k_factor, cap, CAPPED)
        sees = seen[None, :]
        if WINDOWED:
            sees = sees & (o_k[None, :] >= lowest[:, None])
        b_p, alpha, m, l = softmax_step(tl.where(sees, b_s, -float("inf")), m, l, scale)
        b_v = read(v_head, page * stride_v_p + slot * stride_v_s, seen, DV, BLOCK_DV)
        b_v = decoded(b_v, V_FORM, b_q.dtype)
        if WINDOWED:
            acc = weigh_seen(acc * alpha[:, None], b_p, b_v, sees)
        else:
            acc = dot(narrowed(b_p, b_v), b_v, acc * alpha[:, None])

    v_factor = v_scale
    if v_scale is not None:
        if V_POINTER:
            v_factor = tl.load(v_scale + b * stride_vs_b + h * stride_vs_h)
        if k_rows is not None:
            acc = acc * v_factor

    # ---- the rows in flight
    j0, j1 = n * 0, n
    if BRANCHED:  # those of the tile's branches
        j0 = tl.min(tl.where(valid, c, rows), 0) * branch_length
        j1 = (tl.max(tl.where(valid, c, -1), 0) + 1) * branch_length
    if causal_of is None and CAUSAL:
        j1 = tl.minimum(j1, tl.max(r, 0) + 1)
    if (split < SPLITS - 1) | (anyone == 0):
        j0, j1 = j0 * 0, j1 * 0
    for t in tl.range(j0 // BL, tl.cdiv(j1, BL), num_stages=1):
        o_j = t * BL + tl.arange(0, BL)
        c_j, i_j = tl.zeros_like(o_j), o_j
        if BRANCHED:
            c_j, i_j = o_j // branch_length, o_j % branch_length
        seen = (i_j < n) & (c_j < n_branches) & (o_j < rows)
        if k_rows is not None:
            k_at = b * stride_rk_b + c_j.to(tl.int64) * stride_rk_c + i_j.to(tl.int64) * stride_rk_n
            v_at = b * stride_rv_b + c_j.to(tl.int64) * stride_rv_c + i_j.to(tl.int64) * stride_rv_n
            if cu is not None:
                k_at, v_at = (row0 + o_j) * stride_rk_n, (row0 + o_j) * stride_rv_n
            b_k = read(k_rows + h * stride_rk_h, k_at, seen, D, BLOCK_D)
            b_s = scores(b_q, b_k, None, cap, CAPPED)
        else:
            o_k = start + o_j
            seen = seen & (o_k >= 0) & (o_k < capacity)
            page, slot, seen = place(o_k, table, seen, b, num_pages, PAGE)
            v_at = page * stride_v_p + slot * stride_v_s
            b_k = read(k_head, page * stride_k_p + slot * stride_k_s, seen, D, BLOCK_D)
            b_s = scores(b_q, decoded(b_k, K_FORM, b_q.dtype), k_factor, cap, CAPPED)
        sees = seen[None, :] & valid[:, None]
        if mask is not None:
            word = tl.load(words + t // 2, mask=valid, other=0) >> (t % 2 * 32)
            sees = sees & (((word.to(tl.int32)[:, None] >> (o_j % 32)[None, :]) & 1) != 0)
        if BRANCHED:
            sees = sees & (c[:, None] == c_j[None, :])
        if causal_of is not None:
            sees = sees & ((i[:, None] >= i_j[None, :]) | ~is_causal)
        elif CAUSAL:
            sees = sees & (i[:, None] >= i_j[None, :])
        b_p, alpha, m, l = softmax_step(tl.where(sees, b_s, -float("inf")), m, l, scale)
        if k_rows is not None:
            b_v = read(v_rows + h * stride_rv_h, v_at, seen, DV, BLOCK_DV)
        else:
            b_v = decoded(read(v_head, v_at, seen, DV, BLOCK_DV), V_FORM, b_q.dtype)
        acc = weigh_seen(acc * alpha[:, None], b_p, b_v, sees)
    if v_scale is not None and k_rows is None:
        acc = acc * v_factor

    # ---- results
    HQ: tl.constexpr = HKV * G
    o_row = (token * HQ + head).to(tl.int64)
    o_lse = ((b * (rows // branch_length) + c) * HQ + head) * branch_length + i
    if cu is not None:
        o_lse = head.to(tl.int64) * total + token
    m = m * scale
    v_mask = inside[:, None] & (o_v < DV)[None, :]
    if SPLITS == 1:
        sink = None
        if sinks is not None:
            sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        b_o, b_lse = finish(m, l, acc, sink)
        b_o = tl.where(valid[:, None], b_o, 0.0)
        tl.store(out + o_row[:, None] * DV + o_v[None, :], b_o.to(out.dtype.element_ty), v_mask)
        if lse is not None:
            tl.store(lse + o_lse, tl.where(valid, b_lse * LN2, -float("inf")), inside)
    else:
        b_o, b_lse = finish(m, l, acc, None)
        o_part = o_row * SPLITS + split
        v_mask = v_mask & (l != 0)[:, None]  # an empty part is known by its lse
        tl.store(part_out + o_part[:, None] * DV + o_v[None, :], b_o, v_mask)
        # +inf: no row of any request
        b_lse = tl.where(valid, b_lse, float("inf"))
        tl.store(part_lse + o_part, b_lse, inside)


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


@triton.jit(do_not_specialize=["size", "rows", "branch_length", "total"])
def combine(
    part_out, part_lse, out, lse, sinks, size, rows, branch_length, total,
    HQ: tl.constexpr, DV: tl.constexpr, SPLITS: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Puts the parts of ``size`` (row, head) pairs together, BLOCK of them a program."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_v = tl.arange(0, BLOCK_DV)
    inside = o < size
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    for s in tl.static_range(SPLITS):
        top = tl.maximum(top, tl.load(part_lse + o * SPLITS + s, mask=inside, other=0.0))
    valid = top != float("inf")
    safe = tl.where((top == -float("inf")) | ~valid, 0.0, top)
    l = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, BLOCK_DV], tl.float32)
    for s in tl.static_range(SPLITS):
        part = tl.load(part_lse + o * SPLITS + s, mask=inside, other=0.0)
        there = inside & valid & (part != -float("inf"))
        weight = tl.exp2(part - safe)
        l += tl.where(there, weight, 0.0)
        at = part_out + (o * SPLITS + s)[:, None] * DV + o_v[None, :]
        x = tl.load(at, mask=there[:, None] & (o_v < DV)[None, :], other=0.0)
        acc += tl.where(there[:, None], x * weight[:, None], 0.0)
    head, token = (o % HQ).to(tl.int32), o // HQ
    sink = None
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
    b_o, b_lse = finish(top, l, acc, sink)
    b_o = tl.where(valid[:, None], b_o, 0.0)
    v_mask = inside[:, None] & (o_v < DV)[None, :]
    tl.store(out + o[:, None] * DV + o_v[None, :], b_o.to(out.dtype.element_ty), v_mask)
    if lse is not None:
        o_lse = token // branch_length * HQ * branch_length + head * branch_length
        o_lse += token % branch_length
        if PACKED:
            o_lse = head.to(tl.int64) * total + token
        tl.store(lse + o_lse, tl.where(valid, b_lse * LN2, -float("inf")), inside)
