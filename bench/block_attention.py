"""Block attention: CEILINGS table 3.2, a denoised block over a block KV-cache."""

from collections.abc import Iterator

import torch

from .workload import Inputs, Workload

GEOMETRIES = (  # query heads, KV heads, block
    (32, 32, 32),  # LLaDA-8B
    (32, 8, 32),
    (32, 4, 32),
    (16, 4, 32),
    (32, 8, 4),
)
D = 128


def workloads() -> Iterator[Workload]:
    for Hq, Hkv, L in GEOMETRIES:
        for B in (1, 8, 32):
            for context in (1024, 2048, 4096, 8192):
                quick = context == 2048 and (Hq, Hkv, L) == (32, 32, 32) and B in (1, 8)
                yield workload(B, context, L, Hq, Hkv, torch.bfloat16, quick=quick)


def workload(
    B: int, context: int, L: int, Hq: int, Hkv: int, dtype: torch.dtype, *, quick: bool = False
) -> Workload:
    keys, rows = context + L, B * L
    width = torch.finfo(dtype).bits // 8
    return Workload(
        "block_attention",
        f"B={B} context={context} L={L} heads={Hq}/{Hkv} D={D}",
        dtype,
        lambda device: make(B, context, L, Hq, Hkv, dtype, device),
        bytes=width * (2 * B * keys * Hkv * D + 2 * rows * Hq * D),
        flops=4 * rows * Hq * D * keys,
        quick=quick,
    )


def make(
    B: int, context: int, L: int, Hq: int, Hkv: int, dtype: torch.dtype, device: torch.device
) -> Inputs:
    """A dense cache, as diffusion models keep it, with the block's K/V beside it."""
    k_cache, v_cache = (
        torch.randn(B, context, Hkv, D, dtype=dtype, device=device) for _ in range(2)
    )
    q = torch.randn(B, L, Hq, D, dtype=dtype, device=device)
    k, v = (torch.randn(B, L, Hkv, D, dtype=dtype, device=device) for _ in range(2))
    lengths = torch.full((B,), context, dtype=torch.int32, device=device)
    return (q, k_cache, v_cache, k, v), dict(cache_seqlens=lengths)
