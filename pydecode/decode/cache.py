"""The paged K/V cache that the decode loops share: plain tensors, and nothing of any model."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..commit_kv import commit_kv
from ..write_kv import write_kv


class PagedCache:
    """Keys and values of all layers in pages, and how many tokens of each request are committed.

    Every request owns ``ceil(capacity / page_size)`` pages of one pool. The ops take its parts as
    they are: ``tree_attention(q, *cache.layer(i), cache_seqlens=cache.lengths,
    block_table=cache.block_table, ...)``. Rows in flight are written behind ``lengths`` (see
    ``slots`` and ``write``), and become context by ``commit``.

    Attributes:
        k: [layers, num_pages, page_size, Hkv, D]. v: the same with Dv.
        block_table: [B, max_pages] int32.
        lengths: [B] int64, committed tokens; changed in place, so that views stay true.

    Args:
        capacity: tokens a request, rounded up to whole pages; the rows in flight need room too.
        v_head_dim: Dv; None: ``head_dim``.
        shuffle: permutes the pages (for tests: nothing may depend on which page is whose).

    >>> import torch
    >>> from pydecode.decode.cache import PagedCache
    >>> cache = PagedCache(2, 1, 100, num_kv_heads=3, head_dim=64)
    >>> cache.k.shape, cache.capacity
    (torch.Size([2, 7, 16, 3, 64]), 112)
    >>> cache.slots(2).tolist()  # where the next forward's rows go
    [[0, 1]]
    >>> cache.commit(torch.tensor([[0, 1]]), torch.tensor([1]))  # both stay
    >>> cache.lengths.tolist()
    [2]
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        v_head_dim: int | None = None,
        page_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        shuffle: bool = False,
    ) -> None:
        if page_size < 1:
            raise ValueError(f"page_size: expected at least 1, got {page_size}")
        if capacity < 0:
            raise ValueError(f"capacity: expected at least 0 tokens, got {capacity}")
        max_pages = -(-capacity // page_size)
        pool = (num_layers, batch * max_pages, page_size, num_kv_heads)
        self.k = torch.zeros(*pool, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros(*pool, v_head_dim or head_dim, dtype=dtype, device=device)
        pages = torch.randperm(pool[1]) if shuffle else torch.arange(pool[1])
        self.block_table = pages.to(torch.int32).view(batch, max_pages).to(self.k.device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=self.k.device)

    @property
    def capacity(self) -> int:
        """Tokens that one request's pages hold."""
        return self.block_table.shape[1] * self.k.shape[2]

    def layer(self, i: int) -> tuple[Tensor, Tensor]:
        """One layer's (k_cache, v_cache), views [num_pages, page_size, Hkv, D]."""
        return self.k[i], self.v[i]

    def slots(self, num_rows: int, num_tokens: Tensor | None = None) -> Tensor:
        """Where ``num_rows`` rows in flight are written: [B, N], ``lengths[b] + i``.

        -1 (not written) from ``num_tokens[b]`` on. Rows past the capacity raise where the host can
        see the lengths, that is on the CPU; elsewhere they are not written.
        """
        i = torch.arange(num_rows, device=self.lengths.device)
        slots = self.lengths[:, None] + i
        if num_tokens is not None:
            slots = torch.where(i < num_tokens[:, None], slots, -1)
        if slots.numel() and slots.device.type == "cpu":
            last = int(slots.max())
            if last >= self.capacity:
                raise ValueError(
                    f"capacity: expected room for the rows in flight, up to position {last}, "
                    f"got a cache of {self.capacity} positions a request"
                )
        return slots

    def write(
        self, layers: Sequence[int], k: Sequence[Tensor], v: Sequence[Tensor], slots: Tensor
    ) -> None:
        """Puts rows' keys and values, [B, N, Hkv, D] a layer, into their slots: one ``write_kv``.

        To it a layer is a request: all layers' pages are one pool, each layer's behind the last's.
        """
        num_pages = self.k.shape[1]
        first = torch.tensor(layers, device=slots.device)[:, None, None] * num_pages
        table = self.block_table
        # an unmapped page must stay unmapped: -1 would be the last page of the layer before
        mapped = (table >= 0) & (table < num_pages)
        write_kv(
            torch.cat(tuple(k)),
            torch.cat(tuple(v)),
            self.k.flatten(0, 1),
            self.v.flatten(0, 1),
            positions=slots.repeat(len(layers), 1),
            block_table=torch.where(mapped, first + table, -1).flatten(0, 1),
        )

    def commit(self, path: Tensor, num_accepted: Tensor) -> None:
        """Makes an accepted path of the rows in flight context, in all layers (``commit_kv``).

        path [B, P] and num_accepted [B] as verification returns them: path[b, 0] = 0 is the row of
        the last committed token; a request with path[b, 0] < 0 stays as it is.
        """
        lengths = commit_kv(
            *(self.k, self.v, path, num_accepted),
            cache_seqlens=self.lengths,
            block_table=self.block_table,
        )
        self.lengths.copy_(lengths)

    def rows(self, b: slice | Tensor) -> "PagedCache":
        """Some requests of this cache, on the same pool.

        With a slice ``lengths`` are a view, so that what is committed there is committed here; with
        an index tensor they are a copy, for the caller to put back.
        """
        view = object.__new__(PagedCache)
        view.k, view.v = self.k, self.v
        view.block_table, view.lengths = self.block_table[b], self.lengths[b]
        return view
