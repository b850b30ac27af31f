"""``pydecode.checks(True)`` for the attention ops: their device data; all of it synchronises."""

import torch
from torch import Tensor

from .attention_arguments import Pair, Rows
from .reference.numbers import per_request
from .validation import data_at_most, data_range


def check_context_data(
    rows: Rows,
    block_table: Tensor | None,
    num_tokens: Pair,
    cache_seqlens: Pair,
    replace_at: Pair = (-1, None),
    cache_starts: Pair = (0, None),
    cu_seqlens_q: Tensor | None = None,
) -> None:
    """Lengths, starts and counts within the cache and the rows, used page ids within the pool."""
    N, capacity = rows.sizes.N, rows.sizes.capacity
    batch = (rows.sizes.B, rows.q)
    length = check_lengths("cache_seqlens", cache_seqlens, *batch, capacity)
    count = check_lengths("num_tokens", num_tokens, *batch, N)
    hole = check_lengths("replace_at", replace_at, *batch, capacity, low=-1)
    check_lengths("cache_starts", cache_starts, *batch, capacity)
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, rows.q.shape[0], N)
    if cu_seqlens_q is not None:
        count = cu_seqlens_q.diff().long()
    end = length
    if rows.k is None:
        start = torch.where(hole >= 0, hole, length)
        name = "cache_seqlens" if replace_at == (-1, None) else "replace_at"
        what = f"expected room for the rows in flight below the cache's end {capacity}"
        data_at_most(name, start, capacity - count, what)
        end = torch.maximum(length, start + count)
    check_table(block_table, end, *rows.k_cache.shape[:2])


def check_lengths(name: str, pair: Pair, B: int, like: Tensor, high: int, low: int = 0) -> Tensor:
    """The pair as [B], every entry in [low, high]."""
    value = per_request(*pair, B, like, torch.int64)
    data_range(name, value, low, high + 1)
    return value


def check_table(block_table: Tensor | None, length: Tensor, num_pages: int, page_size: int) -> None:
    """Page ids below each length lie in the pool."""
    if block_table is not None and block_table.numel():
        first = torch.arange(block_table.shape[1], device=block_table.device) * page_size
        data_range("block_table", block_table, 0, num_pages, first < length[:, None])


def check_cu_seqlens(name: str, cu_seqlens: Tensor | None, total: int, longest: int) -> None:
    """Monotone within [0, total], no request longer than the static maximum."""
    if cu_seqlens is None:
        return
    data_range(name, cu_seqlens, 0, total + 1)
    data_at_most(name, -cu_seqlens.diff(), 0, "expected no descent")
    data_at_most(name, cu_seqlens.diff(), longest, f"expected lengths of at most {longest}")
