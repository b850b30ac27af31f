"""What the two kernels of ranked attention share: where things lie, and who sees whom."""

import triton
import triton.language as tl

from .attention_steps import clamp, number_of

PAD = tl.constexpr(2**31 - 1)  # the rank of padding
LEAST = tl.constexpr(-(2**31))
# a row of ``lists``: key tiles, then how many are full, how many partial, whose, which tile
HEADER = tl.constexpr(4)

# what a server changes: no recompilation in the middle of serving
VARYING = [
    *("queries", "keys", "total_q", "total_k", "longest_q", "longest_k", "num_pages", "tiles_q"),
    *("tiles_k", "slots", "batch", "window", "stride_table", "stride_mask_b", "stride_mask_n"),
    *("stride_qr_b", "stride_kr_b", "stride_at_b", "stride_lse_b", "stride_lse_h"),
]


@triton.jit
def bounds(cu, b, real, total, longest):
    """Where rows of packed requests b begin and how many there are: 0 unless inside [0, total]."""
    first = tl.load(cu + b, mask=real, other=-1).to(tl.int64)
    last = tl.load(cu + b + 1, mask=real, other=-1).to(tl.int64)
    inside = (first >= 0) & (first <= last) & (last <= total)
    count = tl.where(inside, tl.minimum(last - first, longest), 0)
    return tl.where(inside, first, 0), count.to(tl.int32)


@triton.jit
def request(b, given, stride, cu, total, longest):
    """Where request b's rows begin in a packed batch (0: not packed), and how many there are."""
    if cu is not None:
        return bounds(cu, b, b >= 0, total, longest)
    else:
        count = clamp(number_of(given, b, stride), 0, longest)
        return count * 0, count.to(tl.int32)


@triton.jit
def query_ranks(q_rank, b, first, i, queries, stride_b, stride_n):
    """Ranks of queries i, PAD where there is none: such a row sees nothing."""
    at = b.to(tl.int64) * stride_b + (first + i) * stride_n
    return tl.load(q_rank + at, mask=i < queries, other=PAD)


@triton.jit
def lowest_seen(positions, b, first, i, queries, keys, window, stride_b, stride_n):
    """A window: query i sees keys j > this only. positions: default, the last at the last key."""
    if positions is None:
        at = (i + (keys - queries)).to(tl.int64)
    else:
        where = b.to(tl.int64) * stride_b + (first + i) * stride_n
        at = tl.load(positions + where, mask=i < queries, other=0).to(tl.int64)
    # at may be anything: its difference with the window must not wrap
    return clamp(clamp(at, -(2**40), 2**40) - window, -1, 2**31 - 2).to(tl.int32)


@triton.jit
def pages_of(table, b, j, real, stride, stride_page, num_pages, PAGE_SIZE: tl.constexpr):
    """Pages of keys j, and which of them the pool has."""
    row = table + b.to(tl.int64) * stride
    page = tl.load(row + j // PAGE_SIZE * stride_page, mask=real, other=-1).to(tl.int64)
    return page, (page >= 0) & (page < num_pages)


@triton.jit
def key_ranks(k_rank, b, first, j, real, stride_b, stride_n):
    """Ranks of keys j, PAD where there is none: nobody sees it."""
    at = b.to(tl.int64) * stride_b + (first + j) * stride_n
    return tl.load(k_rank + at, mask=real, other=PAD)


@triton.jit
def visible(rank_i, rank_j, low, j, STRICT: tl.constexpr, WINDOWED: tl.constexpr):
    """[BM, BN]: ranks and window let query i see key j."""
    if STRICT:
        sees = rank_j[None, :] < rank_i[:, None]
    else:
        sees = rank_j[None, :] <= rank_i[:, None]
    sees = sees & (rank_i != PAD)[:, None]
    if WINDOWED:
        sees = sees & (j[None, :] > low[:, None])
    return sees
