"""Random cases of the cache and tree ops; the caches lie between guard bands."""

from typing import Any

import torch
from torch import Tensor

from .. import trees
from .draw import Case, Draw


def _pool(
    d: Draw, B: int, capacity: int, heads: int, dims: tuple[int, int], dtype: torch.dtype
) -> Any:
    """K and V pools with every bit defined, and a table that maps each position of each request."""
    page_size = d.choice([1, 3, 16])
    width = -(-capacity // page_size)
    pages = B * width + d.integer(0, 3)
    table = torch.randperm(pages, generator=d.generator)[: B * width].view(B, width).to(d.device)
    pools = [d.normal(pages, page_size, heads, dim).to(dtype) for dim in dims]
    if d.chance(0.3):
        pools = [pool.transpose(1, 2).contiguous().transpose(1, 2) for pool in pools]
    return pools, table


def commit_kv(d: Draw) -> Case:
    B, P, layers = d.integer(1, 4), d.integer(1, 8), d.integer(1, 3)
    heads, dims = d.choice([1, 2, 8]), (d.choice([16, 128]), 64)
    dtype = d.choice([d.dtype, d.dtype, torch.float8_e4m3fn])
    rows = 20
    pools = [_pool(d, B, 60, heads, dims, dtype) for _ in range(layers)]
    (first, table) = pools[0]
    ks = [first[0], *(torch.empty_like(first[0]) for _ in pools[1:])]
    vs = [first[1], *(torch.empty_like(first[1]) for _ in pools[1:])]
    for x in (*ks[1:], *vs[1:]):
        x.copy_(d.normal(*x.shape).to(dtype))
    path = torch.full((B, P), -1)
    num = [d.integer(0, P - 1) for _ in range(B)]
    for b, n in enumerate(num):
        nodes = 1 + torch.randperm(rows - 1, generator=d.generator)[:n].sort().values
        path[b, 1 : n + 1] = nodes
        path[b, 0] = 0 if d.chance(0.85) else -1  # or undecided
    num_accepted = torch.tensor(num, dtype=torch.int32, device=d.device)
    path = path.int().to(d.device)
    kwargs: dict[str, Any] = dict(cache_seqlens=d.integers(0, 40, B), block_table=table)
    staged = dtype == d.dtype and d.chance(0.4)
    if staged:
        kwargs["source"] = (
            d.normal(layers, B, rows, heads, dims[0]),
            d.normal(layers, B, rows, heads, dims[1]),
        )
    label = f"B={B} P={P} layers={layers} {dtype}{' staged' if staged else ''}"
    return Case((ks, vs, path, num_accepted), kwargs, label.replace("torch.", ""))


def write_kv(d: Draw) -> Case:
    B, N, Hkv, D = (
        d.integer(1, 4),
        d.choice([1, 5, 33]),
        d.choice([1, 2, 8]),
        d.choice([16, 80, 128]),
    )
    wide = d.dtype in (torch.float16, torch.bfloat16, torch.float32)
    dtype = d.choice([d.dtype, torch.float8_e4m3fn, torch.float8_e5m2]) if wide else d.dtype
    (k_cache, v_cache), table = _pool(d, B, 60, Hkv, (D, 64), dtype)
    k, v = d.strided(d.normal(B, N, Hkv, D)), d.strided(d.normal(B, N, Hkv, 64))
    at = torch.stack([torch.randperm(64, generator=d.generator)[:N] for _ in range(B)])
    kwargs: dict[str, Any] = dict(positions=at.to(d.device) - 2, block_table=table)
    what = ""
    if d.chance(0.6):
        half = d.choice([D // 2, D // 4])
        angle = d.uniform(B, N, half) * 100
        kwargs.update(cos=angle.cos(), sin=angle.sin(), interleaved=d.chance(0.5))
        kwargs["q"] = d.strided(d.normal(B, N, Hkv * 2, D))
        what = " rotated"
    if dtype != d.dtype:
        kwargs["k_scale"] = d.uniform(Hkv) + 0.1
        kwargs["v_scale"] = d.uniform(B, Hkv) + 0.1
    label = f"B={B} N={N} Hkv={Hkv} D={D} {dtype}{what}"
    return Case((k, v, k_cache, v_cache), kwargs, label.replace("torch.", ""))


def _parents(d: Draw, B: int, T: int) -> Tensor:
    """Trees, and now and then parents that are none: cycles, out of range, in the wrong order."""
    if d.chance(0.3):
        return d.integers(-2, T + 1, B, T)
    return torch.stack([d.tree(T) for _ in range(B)])


def pack_mask(d: Draw) -> Case:
    B, N = d.integer(1, 4), d.choice([1, 63, 64, 65, 200])
    return Case((d.bools(0.5, B, N, N),), {}, f"B={B} N={N}")


def mask_from_parents(d: Draw) -> Case:
    B, T = d.integer(1, 4), d.choice([1, 7, 64, 65, 200])
    return Case((_parents(d, B, T),), {}, f"B={B} T={T}")


tree_depths = mask_from_parents
tree_links = mask_from_parents


def tree_from_links(d: Draw) -> Case:
    """Links of a tree, or any links at all."""
    B, T = d.integer(1, 4), d.choice([1, 7, 64, 65])
    if d.chance(0.5):
        args = (d.integers(-2, T + 1, B, T), d.integers(-2, T + 1, B, T))
    else:
        parents = torch.stack([d.tree(T) for _ in range(B)])
        args = trees.links(parents, backend="reference")
    return Case(args, {}, f"B={B} T={T}")


def dynamic_tree(d: Draw) -> Case:
    B, T = d.integer(1, 4), d.choice([2, 7, 60])
    parents = torch.stack([d.tree(T) for _ in range(B)])
    scores = -d.uniform(B, T).round(decimals=2)
    scores[:, 0] = 0.0
    num_nodes = d.integer(1, T)
    args = (scores, d.integers(-1, 9, B, T), parents)
    return Case(args, dict(num_nodes=num_nodes, max_depth=T - 1), f"B={B} T={T} nodes={num_nodes}")
