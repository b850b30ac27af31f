"""The K/V cache of masked-diffusion decoding, as one forward pass of the model sees it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pydecode
from pydecode.ranks import PAD

MAX_ROWS = 1024  # of block_attention; longer passes are prefills


@dataclass(frozen=True)
class BlockCache:
    """Handed to the model, which calls ``attend`` once a layer with rotated q and k."""

    k: Tensor | None  # [layers, B, S, Hkv, D]; None: nothing is kept
    v: Tensor | None  # [layers, B, S, Hkv, Dv]
    start: int = 0  # slot of the pass's first row
    context: int = 0  # the rows see cached slots [0, context), and stand in for those at their own
    store: int = 0  # rows in slots below this one are stored
    first: Tensor | None = None  # [B], slots below are padding and seen by nobody
    branches: int = 0  # the rows are this many candidate blocks, which do not see each other

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Attention of the pass's rows, [B, N, Hq, Dv]; stores their K/V where that is due.

        q [B, N, Hq, D], k and v [B, N, Hkv, D]; mask as the model got it: ranks [1|B, N], row i
        sees row j iff mask[j] <= mask[i], or None. ``options``: softmax_scale, softcap, sinks.
        """
        self._write(layer, k, v, self.store - self.start)
        out = self._attend(layer, q, k, v, mask, options)
        assert isinstance(out, Tensor)
        return out.reshape(*q.shape[:3], out.shape[-1])

    def _attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        options: dict[str, Any],
    ) -> Any:
        B, N = q.shape[:2]
        ranks = q.new_zeros(1, N, dtype=torch.int32) if mask is None else mask
        if self.context == 0:  # nothing cached is seen: a prefill, of one request a branch
            if self.branches:
                q, k, v = (self._split(x).flatten(0, 1) for x in (q, k, v))
                ranks = ranks[:, : q.shape[1]].expand(B, -1).repeat_interleave(self.branches, 0)
            return pydecode.ranked_attention(q, k, v, q_rank=ranks, k_rank=ranks, **options)
        assert self.k is not None
        assert self.v is not None
        k_cache, v_cache = self.k[layer], self.v[layer]
        if N > MAX_ROWS and not self.branches:  # a prefill that finds its own rows in their slots
            self._write(layer, k, v, N)
            end = max(self.context, self.start + N)
            k_rank = ranks.new_full((B, end), -1)
            k_rank[:, self.start : self.start + N] = ranks
            if self.first is not None:
                slots = torch.arange(end, device=q.device)
                k_rank = torch.where(slots < self.first[:, None], PAD, k_rank)
            k, v = k_cache[:, :end], v_cache[:, :end]
            return pydecode.ranked_attention(q, k, v, q_rank=ranks, k_rank=k_rank, **options)
        options |= dict(
            cache_seqlens=self.context,
            cache_starts=self.first,
            replace_at=self.start if self.start < self.context else None,
        )
        if self.branches:
            q, k, v = (self._split(x) for x in (q, k, v))
            return pydecode.branch_attention(q, k_cache, v_cache, k, v, **options)
        among = None if mask is None else mask[:, None, :] <= mask[:, :, None]
        return pydecode.block_attention(q, k_cache, v_cache, k, v, mask=among, **options)

    def _write(self, layer: int, k: Tensor, v: Tensor, count: int) -> None:
        """The first ``count`` rows go to their slots."""
        if count > 0:
            assert self.k is not None
            assert self.v is not None
            slots = torch.arange(self.start, self.start + count, device=k.device)
            pydecode.write_kv(
                *(k[:, :count], v[:, :count], self.k[layer], self.v[layer]),
                positions=slots.expand(k.shape[0], count),
            )

    def _split(self, x: Tensor) -> Tensor:
        """[B, K L, ...] -> [B, K, L, ...]."""
        return x.unflatten(1, (self.branches, -1))
