"""Random calls of the attention ops over a cache, for their tests."""

from typing import Any

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

OPS = ("tree_attention", "block_attention", "branch_attention", "ranked_attention")
# every example draws its own inputs, so the function-scoped backend does no harm
FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LAYOUTS = ("NHD", "HND", "interleaved", "padded")


def make_cache(
    first: int, page_size: int, Hkv: int, D: int, Dv: int, dtype: torch.dtype, layout: str
) -> tuple[Tensor, Tensor]:
    """K and V [first, page_size, Hkv, D | Dv] as views of how an engine stores them."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    if layout == "HND":
        k, v = randn(first, Hkv, page_size, D), randn(first, Hkv, page_size, Dv)
        return k.transpose(1, 2), v.transpose(1, 2)
    if layout == "interleaved":
        kv = randn(first, 2, page_size, Hkv, max(D, Dv))
        return kv[:, 0, ..., :D], kv[:, 1, ..., :Dv]
    if layout == "padded":
        return randn(first, page_size, Hkv + 1, D + 3)[..., 1:, 2:-1], randn(
            first, page_size, Hkv, Dv
        )
    return randn(first, page_size, Hkv, D), randn(first, page_size, Hkv, Dv)


def make(
    op: str,
    B: int = 3,
    N: int = 5,
    Hq: int = 4,
    Hkv: int = 2,
    D: int = 16,
    Dv: int = 8,
    *,
    K: int = 3,
    dtype: torch.dtype = torch.float64,
    cache_dtype: torch.dtype | None = None,
    page_size: int = 4,
    pages: int = 4,
    paged: bool = True,
    own: bool = True,
    layout: str = "NHD",
    **kwargs: Any,
) -> tuple[list[Any], dict[str, Any]]:
    """(args, kwargs) of a call with random lengths; ``own``: k and v are given beside the cache."""
    capacity = pages * page_size
    shape = (B, K, N) if op == "branch_attention" else (B, N)
    first, size = (B * pages + 2, page_size) if paged else (B, capacity)
    cache = make_cache(first, size, Hkv, D, Dv, cache_dtype or dtype, layout)
    call: dict[str, Any] = {}
    if paged:
        call["block_table"] = torch.randperm(first)[: B * pages].view(B, pages)
    high = capacity if own else capacity - N
    call["cache_seqlens"] = torch.randint(0, max(high, 0) + 1, (B,))
    args: list[Any] = [torch.randn(*shape, Hq, D).to(dtype), *cache]
    if op == "ranked_attention":
        call["q_rank"] = torch.randint(0, 5, (B, N), dtype=torch.int32)
        call["k_rank"] = torch.randint(0, 5, (B, capacity), dtype=torch.int32)
    elif own:
        args += [torch.randn(*shape, Hkv, d).to(dtype) for d in (D, Dv)]
    call.update(kwargs)
    return args, {name: value for name, value in call.items() if value is not None}


def packed(x: Tensor, counts: list[int]) -> Tensor:
    """[B, N, ...] -> [total, ...], the first counts[b] rows of each."""
    return torch.cat([x[b, :n] for b, n in enumerate(counts)])


def cumulative(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def random_parents(n: int) -> list[int]:
    """A random tree in which parents precede children."""
    return [-1] + [int(torch.randint(0, i, ())) for i in range(1, n)]


def tree_mask(parents: list[int]) -> Tensor:
    """bool [N, N]: row i sees its ancestors and itself."""
    n = len(parents)
    mask = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        j = i
        while j >= 0:
            mask[i, j] = True
            j = parents[j]
    return mask
