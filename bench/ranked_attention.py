"""Ranked attention: prefill under causal, block-causal and bidirectional ranks."""

from collections.abc import Iterator

import torch

from pydecode import ranks

from .workload import Inputs, Workload

D = 128
BLOCK = 32


def workloads() -> Iterator[Workload]:
    for kind in ("causal", "block_causal", "bidirectional"):
        for B, N in ((1, 1024), (1, 4096), (8, 4096), (1, 16384)):
            quick = N == 1024 and kind != "bidirectional"
            yield workload(kind, B, N, 32, 8, torch.bfloat16, quick=quick)


def workload(
    kind: str, B: int, N: int, Hq: int, Hkv: int, dtype: torch.dtype, *, quick: bool = False
) -> Workload:
    rank = rank_of(kind, N)
    pairs = B * int(torch.searchsorted(rank[0], rank[0], right=True).sum())
    width = torch.finfo(dtype).bits // 8
    return Workload(
        "ranked_attention",
        f"{kind} B={B} N={N} heads={Hq}/{Hkv} D={D}",
        dtype,
        lambda device: make(kind, B, N, Hq, Hkv, dtype, device),
        bytes=width * B * N * D * 2 * (Hq + Hkv),
        flops=4 * pairs * Hq * D,
        quick=quick,
    )


def rank_of(kind: str, N: int) -> torch.Tensor:
    if kind == "causal":
        return ranks.causal(N)
    return ranks.block_causal(N, BLOCK) if kind == "block_causal" else torch.zeros(1, N).int()


def make(
    kind: str, B: int, N: int, Hq: int, Hkv: int, dtype: torch.dtype, device: torch.device
) -> Inputs:
    q = torch.randn(B, N, Hq, D, dtype=dtype, device=device)
    k, v = (torch.randn(B, N, Hkv, D, dtype=dtype, device=device) for _ in range(2))
    rank = rank_of(kind, N).to(device)
    return (q, k, v), dict(q_rank=rank, k_rank=rank)
