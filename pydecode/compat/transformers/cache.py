"""A ``transformers.Cache`` whose keys and values lie in one paged pool of pydecode's."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import pydecode

from ...decode.cache import PagedCache

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig, PreTrainedModel
    from transformers.cache_utils import CacheLayerMixin
else:
    try:
        from transformers import Cache
        from transformers.cache_utils import CacheLayerMixin
    except ImportError:  # this module imports without its peer
        Cache = CacheLayerMixin = object


class PydecodeCache(Cache):
    """Takes the place of ``DynamicCache`` in ``model.generate(past_key_values=...)`` and ``model``.

    One pool of pages holds all layers; every request owns its pages. Under the attention
    implementation "pydecode" attention reads the pages where they lie; under any other, ``update``
    gathers them, a copy of the layer's whole context a call. Sliding-window layers keep everything
    here, and the window acts in attention. Seen in transformers 5.23.

    Args:
        config: the model, or its config: the very object, whose attention implementation counts.
        capacity: tokens a request, padding included; ``generate`` needs its ``max_length``, and
            assisted generation the drafted tokens as well. Allocated with the first update.

    Where ours differs: the capacity is fixed (theirs grows with a copy a token).

    Raises:
        ValueError: an update past the capacity; layers that differ in their heads; ``crop`` with a
            positive number, as theirs.

    >>> import torch, transformers
    >>> from pydecode.compat.transformers import PydecodeCache
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2, attn_implementation="pydecode")
    >>> model = transformers.LlamaForCausalLM(config)
    >>> cache = PydecodeCache(model, capacity=30)
    >>> ids = model.generate(
    ...     torch.tensor([[7, 8, 9]]), max_new_tokens=20, past_key_values=cache, eos_token_id=None)
    >>> ids.shape, cache.get_seq_length()
    (torch.Size([1, 23]), 22)
    """

    layers: list[Any]
    pool: PagedCache | None = None
    slots: tuple[tuple[int, ...], Tensor] | None = None  # of this pass, the same for all layers

    def __init__(
        self,
        config: "PreTrainedModel | PreTrainedConfig",
        capacity: int,
        *,
        page_size: int = 16,
        shuffle: bool = False,
    ) -> None:
        whole: Any = getattr(config, "config", config)
        self.config = whole.get_text_config(decoder=True)
        self.capacity, self.page_size, self.shuffle = capacity, page_size, shuffle
        super().__init__(layers=[PagedLayer(self, i) for i in range(self.config.num_hidden_layers)])

    def __deepcopy__(self, memo: dict[int, Any]) -> "PydecodeCache":
        """A prompt's cache is copied for several answers; the config stays the model's own."""
        new = object.__new__(type(self))
        memo |= {id(self): new, id(self.config): self.config}
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Request b goes on with the tokens of request beam_idx[b]: pages are copied."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.pool is not None:
            rows = torch.arange(len(self.pool.block_table), device=self.pool.k.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these requests, in this order; one may be named several times: pages are copied."""
        old = self.pool
        if old is None:
            return
        table = old.block_table[indices.to(old.k.device)]
        same = len(table) == len(old.block_table)
        new = old if same else self._new_pool(len(table), old.k, old.v)
        used = -(-self._longest // self.page_size)
        source, target = (x[:, :used].flatten().long() for x in (table, new.block_table))
        # what is read is gathered before anything is written
        new.k[:, target], new.v[:, target] = old.k[:, source], old.v[:, source]
        self.pool = new

    @property
    def _longest(self) -> int:
        """Tokens a request, in the layers that a pass has reached."""
        return max(layer.get_seq_length() for layer in self.layers)

    def reset(self) -> None:
        """Forgets all tokens; the pool stays, for a batch of the same size."""
        for layer in self.layers:
            layer.reset()

    def _new_pool(self, batch: int, k: Tensor, v: Tensor) -> PagedCache:
        """An empty pool for keys [..., Hkv, D] and values [..., Hkv, Dv]."""
        return PagedCache(
            *(len(self.layers), batch, self.capacity, *k.shape[-2:]),
            v_head_dim=v.shape[-1],
            page_size=self.page_size,
            dtype=k.dtype,
            device=k.device,
            shuffle=self.shuffle,
        )

    def _pool_for(self, k: Tensor, v: Tensor) -> PagedCache:
        """The pool that rows [B, N, Hkv, D] go to, made with the first ones."""
        pool = self.pool
        if pool is None or (len(k) != len(pool.block_table) and not self._longest):
            pool = self.pool = self._new_pool(len(k), k, v)
            self.nan = k.new_full((), torch.nan)
        have = (len(pool.block_table), *pool.k.shape[-2:], pool.v.shape[-1])
        if (len(k), *k.shape[-2:], v.shape[-1]) != have:
            raise ValueError(
                f"key_states, value_states: expected (B, Hkv, D, Dv) = {have}, as the first ones, "
                f"got {(len(k), *k.shape[-2:], v.shape[-1])}"
            )
        return pool

    def _slots(self, start: int, end: int, k: Tensor) -> Tensor:
        key = (start, end, len(k))
        if self.slots is None or self.slots[0] != key:
            slots = torch.arange(start, end, device=k.device).expand(k.shape[:2])
            self.slots = key, slots
        return self.slots[1]


class PagedLayer(CacheLayerMixin):
    """One layer of a ``PydecodeCache``."""

    is_croppable = True
    is_sliding = False
    supports_early_init = False
    keys = values = None  # transformers' own layers keep tensors here

    def __init__(self, cache: PydecodeCache, index: int) -> None:
        self.cache, self.index, self.length = cache, index, 0
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The first update does it."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes rows [B, Hkv, N, D] behind the others; returns all keys and values so far.

        Under attn_implementation="pydecode": what has their shapes, holds NaN, and names this layer
        as ``_pydecode_layer``, which the attention function reads in their place.
        """
        k, v = key_states.transpose(1, 2), value_states.transpose(1, 2)
        pool = self.cache._pool_for(k, v)
        end = self.length + k.shape[1]
        if end > pool.capacity:
            raise ValueError(
                f"capacity: expected room for {end} tokens a request, got a PydecodeCache of "
                f"{pool.capacity}"
            )
        caches = pool.layer(self.index)
        slots = self.cache._slots(self.length, end, k)
        pydecode.write_kv(k, v, *caches, positions=slots, block_table=pool.block_table)
        self.length, self.is_initialized = end, True
        if self.cache.config._attn_implementation == "pydecode":
            B, H, _, D = key_states.shape
            nan = self.cache.nan
            keys, values = nan.expand(B, H, end, D), nan.expand(B, H, end, v.shape[3])
            keys._pydecode_layer = self  # type: ignore[attr-defined]
            return keys, values
        table = pool.block_table[:, : -(-end // self.cache.page_size)]
        keys, values = (x[table].flatten(1, 2)[:, :end].transpose(1, 2) for x in caches)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.cache.capacity

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` tokens: a negative number, as in transformers."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: expected at most 0, got {tokens_to_remove}")
        self.length = max(self.length + tokens_to_remove, 0)

    def reset(self) -> None:
        self.length = 0

    def offload(self) -> None:
        raise NotImplementedError("offload: the pool stays where it is")
