"""Cache slots: where a position lies, and how rows are read from and written into slots.

A slot is ``page * page_size + offset`` of a cache [pages, page_size, Hkv, D]; without a table a
request is its own page ([B, S, Hkv, D]: slot b * S + position). Caches are any strided views.
Nothing here synchronises, and no row that is not to be written touches a bit, on any device.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Slots(NamedTuple):
    """Where positions lie; an entry that is not valid has slot 0, which nobody may use."""

    slot: Tensor  # int64
    valid: Tensor  # bool: not negative, below the capacity, on a page of the pool


class Writes(NamedTuple):
    """Which row goes to which slot. Equal slots take the same row, so their order is no matter."""

    page: Tensor  # int64 [M]
    offset: Tensor  # int64 [M], within the page
    row: Tensor  # int64 [M]
    some: Tensor  # bool, 0-d: there is a row to write at all


def capacity_of(cache: Tensor, block_table: Tensor | None) -> int:
    """Positions that one request has in a cache [..., pages or B, page_size or S, Hkv, D]."""
    return cache.shape[-3] * (1 if block_table is None else block_table.shape[1])


def slots_of(positions: Tensor, block_table: Tensor | None, pages: int, page_size: int) -> Slots:
    """Slots of cache positions [B, N] in a cache [..., pages or B, page_size or S, Hkv, D]."""
    capacity = page_size * (1 if block_table is None else block_table.shape[1])
    at = positions.long()
    valid = (at >= 0) & (at < capacity)
    at = torch.where(valid, at, 0)
    if pages == 0 or capacity == 0:
        return Slots(at, torch.zeros_like(valid))
    if block_table is None:
        page, offset = torch.arange(at.shape[0], device=at.device)[:, None], at
    else:
        page, offset = block_table.long().gather(1, at // page_size), at % page_size
    valid = valid & (page >= 0) & (page < pages)
    return Slots(torch.where(valid, page * page_size + offset, 0), valid)


def plan_writes(slots: Slots, page_size: int) -> Writes:
    """The last row of each slot wins; a row that is not valid repeats some other row's write.

    Without a valid row at all, slot 0 is rewritten with its own bits.
    """
    key = torch.where(slots.valid, slots.slot, -1).flatten()
    ordered, order = key.sort(stable=True)
    target = torch.where(ordered < 0, ordered[-1], ordered)
    last = torch.searchsorted(ordered, target, right=True) - 1
    target = target.clamp(min=0)
    return Writes(target // page_size, target % page_size, order[last], ordered[-1] >= 0)


def read(cache: Tensor, slot: Tensor) -> Tensor:
    """Rows [..., Hkv, D] of a cache at slots [...], copied."""
    return _bits(cache)[slot // cache.shape[1], slot % cache.shape[1]].view(cache.dtype)


def write(cache: Tensor, writes: Writes, rows: Tensor) -> None:
    """Puts rows [M, Hkv, D] of the cache's dtype into their slots, in place."""
    on_cpu = cache.device.type == "cpu"
    if on_cpu and not writes.some:
        return
    at = (writes.page, writes.offset)
    cache, rows = _bits(cache), _bits(rows).index_select(0, writes.row)
    cache.index_put_(at, rows if on_cpu else torch.where(writes.some, rows, cache[at]))


def _bits(x: Tensor) -> Tensor:
    """fp8 as bytes: indexing knows every dtype but these."""
    return x.view(torch.uint8) if x.element_size() == 1 else x
