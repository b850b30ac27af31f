"""The first kernel of ranked attention: which tiles of keys a tile of queries needs.

From the smallest and the largest rank of a tile (and of the windows), or by looking where there is
a mask, all pairs of a tile are visible, some, or none. See ``plan`` for what is left behind.
"""

import triton
import triton.language as tl

from .ranked_steps import (
    HEADER,
    LEAST,
    PAD,
    VARYING,
    bounds,
    key_ranks,
    lowest_seen,
    pages_of,
    query_ranks,
    request,
    visible,
)


@triton.jit
def slot_of(slot, cu, batch, total, longest, BM: tl.constexpr):
    """Request and tile of the slot-th tile of queries of a packed batch; ``batch``: nobody's."""
    b, tile, before = slot * 0 + batch, slot * 0, slot * 0
    for r in range(0, batch, 32):
        r = r + tl.arange(0, 32)
        _, count = bounds(cu, r, r < batch, total, longest)
        tiles = tl.cdiv(count, BM)
        begin = before + tl.cumsum(tiles, 0) - tiles
        mine = (slot >= begin) & (slot < begin + tiles)
        b = tl.minimum(b, tl.min(tl.where(mine, r, batch), 0))
        tile += tl.sum(tl.where(mine, slot - begin, 0), 0)
        before += tl.sum(tiles, 0)
    return b, tile


@triton.jit
def owners(rows, cu, batch, total, longest, slots, BM: tl.constexpr):
    """The first request that has each of these rows, and a slot for it; ``batch``: nobody."""
    owner = rows * 0 + batch
    before = batch * 0
    for b in range(0, batch, 16):
        r = b + tl.arange(0, 16)
        first, count = bounds(cu, r, r < batch, total, longest)
        tiles = tl.cdiv(count, BM)
        begin = before + tl.cumsum(tiles, 0) - tiles
        row = rows[:, None] - first[None, :]
        mine = (row >= 0) & (row < count[None, :]) & (begin[None, :] + row // BM < slots)
        owner = tl.minimum(owner, tl.min(tl.where(mine, r[None, :], batch), 1))
        before += tl.sum(tiles, 0)
    return owner


@triton.jit
def give_owners(
    rows, out, lse, owner_of, cu, batch, total, longest, slots, stride_lse_h, heads, width,
    BM: tl.constexpr,
):  # fmt: skip
    """Notes whose these rows are; a row that nobody owns is given out as 0 and -inf."""
    owner = owners(rows, cu, batch, total, longest, slots, BM)
    tl.store(owner_of + rows, owner, mask=rows < total)
    orphan = (rows < total) & (owner == batch)
    if tl.max(orphan.to(tl.int32), 0) > 0:
        d = tl.arange(0, 16)
        for c in range(0, width, 16):
            at = rows.to(tl.int64)[:, None] * width + c + d[None, :]
            real = orphan[:, None] & (c + d < width)[None, :]
            tl.store(out + at, tl.zeros([BM, 16], out.dtype.element_ty), mask=real)
        if lse is not None:
            for h in range(0, heads):
                tl.store(lse + h * stride_lse_h + rows, -float("inf"), mask=orphan)


@triton.jit
def allowed(mask, b, first, start, i, j, queries, keys, stride_b, stride_n, FORM: tl.constexpr):
    """[BM, BN]: the mask lets query i see key j, in tiles from ``start`` and ``min(j)`` on.

    FORM: 1 is bool (bytes), 2 is bits, where the tile of keys lies inside one word.
    """
    row = mask + b.to(tl.int64) * stride_b + (first + start) * stride_n
    row += (i - start) * stride_n.to(tl.int64)
    j_0 = tl.min(j, 0)
    if FORM == 1:
        real = (i < queries)[:, None] & (j < keys)[None, :]
        at = row[:, None] + j_0 + (j - j_0)[None, :]
        return tl.load(at, mask=real, other=0) != 0
    else:
        word = tl.load(row + j_0 // 64, mask=i < queries, other=0)
        low, high = word.to(tl.int32)[:, None], (word >> 32).to(tl.int32)[:, None]
        return ((tl.where((j % 64 < 32)[None, :], low, high) >> (j % 32)[None, :]) & 1) != 0


@triton.jit(do_not_specialize=VARYING)
def plan(
    out, lse, lists, words, q_rank, k_rank, mask, table, positions, queries, keys, cu_q, cu_k,
    batch, total_q, total_k, longest_q, longest_k, num_pages, slots, tiles_q, tiles_k, window,
    stride_queries, stride_keys, stride_qr_b, stride_qr_n, stride_kr_b, stride_kr_n,
    stride_mask_b, stride_mask_n, stride_table, stride_page, stride_at_b, stride_at_n, stride_lse_h,
    heads, width, PAGE_SIZE: tl.constexpr, STRICT: tl.constexpr,
    WINDOWED: tl.constexpr, MASK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """lists [slots, tiles_k + 4]: for each tile of queries the tiles of keys that need no test,
    from the front, those that do, from the back, then how many of each, the request and its tile.
    A packed batch's tiles of queries follow each other; behind its lists lies the owner of each
    row. With a mask, words [slots, tiles_k, BN / 32, BM] hold for each partial tile and query
    the keys that it sees.
    """
    slot = tl.program_id(0)
    o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)
    if cu_q is not None and slot >= slots:
        rows = (slot - slots) * BM + o_m
        give_owners(
            rows, out, lse, lists + slots.to(tl.int64) * (tiles_k + HEADER), cu_q, batch, total_q,
            longest_q, slots, stride_lse_h, heads, width, BM,
        )  # fmt: skip
        return
    row = lists + slot.to(tl.int64) * (tiles_k + HEADER)
    if cu_q is not None:
        b, tile_q = slot_of(slot, cu_q, batch, total_q, longest_q, BM)
        tl.store(row + tiles_k + 2, b)
        tl.store(row + tiles_k + 3, tile_q)
        if b == batch:
            tl.store(row + tiles_k, 0)
            tl.store(row + tiles_k + 1, 0)
            return
    else:
        b, tile_q = slot // tiles_q, slot % tiles_q

    # ranks of the queries
    i = tile_q * BM + o_m
    first_q, m = request(b, queries, stride_queries, cu_q, total_q, longest_q)
    first_k, n = request(b, keys, stride_keys, cu_k, total_k, longest_k)
    rank_i = query_ranks(q_rank, b, first_q, i, m, stride_qr_b, stride_qr_n)
    valid = rank_i != PAD
    least = tl.min(rank_i, 0)
    most = tl.max(tl.where(valid, rank_i, LEAST), 0)
    low = tl.zeros([BM], tl.int32)
    if WINDOWED:
        low = lowest_seen(positions, b, first_q, i, m, n, window, stride_at_b, stride_at_n)
    low_least = tl.min(tl.where(valid, low, PAD), 0)
    low_most = tl.max(tl.where(valid, low, -1), 0)

    # tiles of keys, TILES at a time
    WIDTH: tl.constexpr = BN if BN < 32 else 32
    full, partial = 0, 0
    start = 0
    end = tl.where(tl.max(valid.to(tl.int32), 0) > 0, tl.cdiv(n, BN), 0)
    if WINDOWED:
        start = tl.minimum((low_least + 1) // BN, end)
    for t in range(start, end, TILES):
        tile = t + tl.arange(0, TILES)
        if MASK == 0:
            j = tile[:, None] * BN + o_n[None, :]
            real = j < n
            if PAGE_SIZE > 0:
                _, mapped = pages_of(
                    table, b, j, real, stride_table, stride_page, num_pages, PAGE_SIZE
                )
                real = real & mapped
            rank_j = key_ranks(k_rank, b, first_k, j, real, stride_kr_b, stride_kr_n)
            smallest, largest = tl.min(rank_j, 1), tl.max(rank_j, 1)
            if STRICT:
                some, every = smallest < most, largest < least
            else:
                some, every = smallest <= most, largest <= least
            if WINDOWED:
                every = every & (tile * BN > low_most)
        else:
            found, missed = 0, 0
            for c in tl.static_range(0, BN, WIDTH):
                j = t * BN + c + tl.arange(0, WIDTH)
                real = j < n
                if PAGE_SIZE > 0:
                    _, mapped = pages_of(
                        table, b, j, real, stride_table, stride_page, num_pages, PAGE_SIZE
                    )
                    real = real & mapped
                rank_j = key_ranks(k_rank, b, first_k, j, real, stride_kr_b, stride_kr_n)
                sees = visible(rank_i, rank_j, low, j, STRICT, WINDOWED)
                sees = sees & allowed(
                    mask, b, first_q, tile_q * BM, i, j, m, n, stride_mask_b, stride_mask_n, MASK
                )
                hidden = (1 - sees.to(tl.int32)) * valid.to(tl.int32)[:, None]
                found = tl.maximum(found, tl.max(tl.max(sees.to(tl.int32), 1), 0))
                missed = tl.maximum(missed, tl.max(tl.max(hidden, 1), 0))
                word = tl.sum(sees.to(tl.int32) << tl.arange(0, WIDTH)[None, :], 1)
                at = (slot.to(tl.int64) * tiles_k + t) * (BM * ((BN + 31) // 32)) + o_m
                tl.store(words + at + c // 32 * BM, word)
            some, every = tile * 0 + found > 0, tile * 0 + missed == 0
        some = some & (tile < end)
        is_full = (some & every).to(tl.int32)
        is_partial = some.to(tl.int32) - is_full
        tl.store(row + full + tl.cumsum(is_full, 0) - 1, tile, mask=is_full != 0)
        at = tiles_k - partial - tl.cumsum(is_partial, 0)
        tl.store(row + at, tile, mask=is_partial != 0)
        full += tl.sum(is_full, 0)
        partial += tl.sum(is_partial, 0)
    tl.store(row + tiles_k, full)
    tl.store(row + tiles_k + 1, partial)
