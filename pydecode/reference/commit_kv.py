"""Keeps the accepted path's K/V: row path[j] moves to cache position cache_seqlens + j.

The KV rearrangement after tree verification (SpecInfer, Miao et al., ASPLOS 2024, section 4.3;
Medusa, Cai et al., ICML 2024): path[0] = 0 is the last committed token, whose K/V this forward
computed, and the path strictly increases, so that a row only ever moves towards the front.
"""

import torch
from torch import Tensor

from .slots import Slots, capacity_of, plan_writes, read, slots_of, write

MAX_ROWS = 1024  # rows in flight of one forward


def commit_kv(
    k_caches: list[Tensor],
    v_caches: list[Tensor],
    path: Tensor,
    num_accepted: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    k_rows: Tensor | None,
    v_rows: Tensor | None,
) -> Tensor:
    """path [B, P], staging k_rows, v_rows [layers, B, N, Hkv, D] -> new cache_seqlens [B]."""
    B, P = path.shape
    if B == 0 or P == 0:
        return cache_seqlens.clone()
    cache = k_caches[0]
    good = good_paths(
        path,
        num_accepted,
        cache_seqlens,
        capacity_of(cache, block_table),
        num_rows=MAX_ROWS if k_rows is None else k_rows.shape[2],
        staged=k_rows is not None,
    )
    result = torch.where(
        good, cache_seqlens + num_accepted.to(cache_seqlens.dtype) + 1, cache_seqlens
    )
    if cache.shape[-4] * cache.shape[-3] == 0 or (k_rows is not None and k_rows.shape[2] == 0):
        return result

    # the slot of each committed row, and where its K/V lie now
    j = torch.arange(P, device=path.device)
    keep = good[:, None] & (j <= num_accepted[:, None])
    node = torch.where(keep, path.long(), 0)
    start = torch.where(good, cache_seqlens.long(), 0)[:, None]
    target = slots_of(start + j, block_table, *cache.shape[-4:-2])
    valid = keep & target.valid
    if k_rows is None or v_rows is None:
        source = slots_of(start + node, block_table, *cache.shape[-4:-2])
        valid = valid & source.valid & (source.slot != target.slot)
    writes = plan_writes(Slots(target.slot, valid), cache.shape[-3])
    if path.device.type == "cpu" and not writes.some:  # a chain stays where it is
        return result
    for layer, (k_cache, v_cache) in enumerate(zip(layers(k_caches), layers(v_caches))):
        for cache, rows in ((k_cache, k_rows), (v_cache, v_rows)):
            if rows is None:  # all rows are read before the first is written
                moved = read(cache, source.slot)
            else:
                moved = rows[layer][torch.arange(B, device=path.device)[:, None], node]
            write(cache, writes, moved.flatten(0, 1))
    return result


def layers(caches: list[Tensor]) -> list[Tensor]:
    """One tensor a layer: the schema hands a stacked tensor [layers, ...] over as a list of one."""
    return list(caches[0].unbind(0)) if caches[0].dim() == 5 else list(caches)


def good_paths(
    path: Tensor,
    num_accepted: Tensor,
    cache_seqlens: Tensor,
    capacity: int,
    *,
    num_rows: int,
    staged: bool,
) -> Tensor:
    """bool [B]: the request is decided, its path 0 = path[0] < path[1] < ... is one of rows that
    exist, and what it commits lies inside its cache."""
    n = num_accepted.long()
    node = path.long()
    P = path.shape[1]
    j = torch.arange(P, device=path.device)
    previous = torch.cat([torch.full_like(node[:, :1], -1), node[:, :-1]], 1)
    in_order = ((node > previous) | (j > n[:, None])).all(1)
    last = node.gather(1, n.clamp(0, P - 1)[:, None])[:, 0]
    furthest = n if staged else last  # from the length; their sum could wrap around
    fits = cache_seqlens.long() < capacity - furthest
    inside = (cache_seqlens >= 0) & (last < num_rows) & fits
    return (node[:, 0] == 0) & (n >= 0) & (n < P) & in_order & inside
