"""Caches in every layout, cut out of one buffer of random bytes, and where their slots lie."""

from typing import NamedTuple

import torch
from torch import Tensor

LAYOUTS = ("nhd", "hnd", "interleaved", "padded")


class Pool(NamedTuple):
    """K and V of some layers inside one buffer; what lies around them is a guard band."""

    buffer: Tensor  # uint8
    k: list[Tensor]  # a layer each, [pages, page_size, Hkv, D]
    v: list[Tensor]

    def clone(self) -> "Pool":
        buffer = self.buffer.clone()

        def again(x: Tensor) -> Tensor:
            flat = buffer.view(x.dtype)
            return flat.as_strided(x.shape, x.stride(), x.storage_offset())

        return Pool(buffer, [again(x) for x in self.k], [again(x) for x in self.v])


def make_pool(
    layout: str,
    pages: int,
    page_size: int,
    heads: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    *,
    layers: int = 1,
) -> Pool:
    """A pool full of random bytes, NaN and Inf among them."""
    D, Dv = dims
    pad = 5 if layout == "padded" else 0
    width = max(D, Dv) + pad
    each = pages * page_size * heads * width
    guard = 64
    total = layers * 2 * each + 2 * guard
    buffer = torch.randint(0, 256, (total * dtype.itemsize,), dtype=torch.uint8)
    inside = buffer.view(dtype)[guard : total - guard]
    if layout == "interleaved":  # K and V of a page side by side
        kv = inside.view(layers, pages, 2, page_size, heads, width).transpose(1, 2)
    elif layout == "hnd":
        kv = inside.view(layers, 2, pages, heads, page_size, width).transpose(3, 4)
    else:
        kv = inside.view(layers, 2, pages, page_size, heads, width)
    return Pool(
        buffer, [x[..., :D] for x in kv[:, 0].unbind(0)], [x[..., :Dv] for x in kv[:, 1].unbind(0)]
    )


def make_table(batch: int, width: int, pages: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """Distinct pages of the pool in random order."""
    return torch.randperm(pages)[: batch * width].view(batch, width).to(dtype)


def slot_of(cache: Tensor, block_table: Tensor | None, b: int, position: int) -> tuple | None:
    """(page, offset) of a cache position, or None where there is none."""
    pages, page_size = cache.shape[:2]
    if position < 0:
        return None
    if block_table is None:
        return (b, position) if position < page_size else None
    if position >= block_table.shape[1] * page_size:
        return None
    page = int(block_table[b, position // page_size])
    return (page, position % page_size) if 0 <= page < pages else None


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    got, want = got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8)
    different = (got != want).nonzero()
    assert different.numel() == 0, f"{len(different)} bytes differ, the first at {different[0]}"
