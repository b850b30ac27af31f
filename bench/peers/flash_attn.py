"""``flash_attn_with_kvcache``: a bidirectional block over a paged or dense cache.

It appends the block's K/V in place, which ours does not; no masks, so no trees.
"""

from collections.abc import Callable
from importlib import util
from typing import Any

from torch import Tensor

from . import Unsupported

NAME = "flash_attn_with_kvcache"


def missing() -> str:
    return "" if util.find_spec("flash_attn") else "flash_attn is not installed"


def block(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, **kwargs: Any
) -> Callable[[], object]:
    """A cache with room for the block is made beforehand."""
    from flash_attn import flash_attn_with_kvcache

    if kwargs.get("block_table") is not None:
        raise Unsupported("here only dense caches")
    lengths, L = kwargs["cache_seqlens"], q.shape[1]
    caches = []
    for cache in (k_cache, v_cache):
        roomy = cache.new_zeros(cache.shape[0], cache.shape[1] + L, *cache.shape[2:])
        roomy[:, : cache.shape[1]] = cache
        caches.append(roomy)
    return lambda: flash_attn_with_kvcache(
        q, *caches, k=k, v=v, cache_seqlens=lengths, causal=False
    )


OPS = {"block_attention": block}
