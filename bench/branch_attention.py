"""Branch attention: K drafted states of one block over a context that is read once for all."""

from collections.abc import Iterator

import torch

from .workload import Inputs, Workload

D = 128


def workloads() -> Iterator[Workload]:
    for B, K, context in ((1, 4, 2048), (1, 4, 8192), (8, 4, 2048), (8, 8, 8192)):
        yield workload(B, K, 32, context, 32, 8, torch.bfloat16, quick=(B, context) == (1, 2048))


def workload(
    B: int,
    K: int,
    L: int,
    context: int,
    Hq: int,
    Hkv: int,
    dtype: torch.dtype,
    *,
    quick: bool = False,
) -> Workload:
    rows = B * K * L
    width = torch.finfo(dtype).bits // 8
    return Workload(
        "branch_attention",
        f"B={B} K={K} L={L} context={context} heads={Hq}/{Hkv} D={D}",
        dtype,
        lambda device: make(B, K, L, context, Hq, Hkv, dtype, device),
        bytes=width * (2 * (B * context + rows) * Hkv * D + 2 * rows * Hq * D),
        flops=4 * rows * Hq * D * (context + L),
        quick=quick,
    )


def make(
    B: int,
    K: int,
    L: int,
    context: int,
    Hq: int,
    Hkv: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Inputs:
    k_cache, v_cache = (
        torch.randn(B, context, Hkv, D, dtype=dtype, device=device) for _ in range(2)
    )
    q = torch.randn(B, K, L, Hq, D, dtype=dtype, device=device)
    k, v = (torch.randn(B, K, L, Hkv, D, dtype=dtype, device=device) for _ in range(2))
    lengths = torch.full((B,), context, dtype=torch.int32, device=device)
    return (q, k_cache, v_cache, k, v), dict(cache_seqlens=lengths)
