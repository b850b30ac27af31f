"""Merging attention states: parts of a context, joined."""

from collections.abc import Iterator

import torch

from .workload import Inputs, Workload


def workloads() -> Iterator[Workload]:
    for M, B, N in ((2, 1, 64), (2, 64, 64), (8, 32, 64)):
        yield workload(M, B, N, 32, 128, torch.bfloat16, quick=B == 1)


def workload(
    M: int, B: int, N: int, H: int, D: int, dtype: torch.dtype, *, quick: bool = False
) -> Workload:
    width = torch.finfo(dtype).bits // 8

    def make(device: torch.device) -> Inputs:
        outs = torch.randn(M, B, N, H, D, dtype=dtype, device=device)
        return (outs, torch.randn(M, B, H, N, device=device)), {}

    return Workload(
        "merge_states",
        f"M={M} B={B} N={N} H={H} D={D}",
        dtype,
        make,
        bytes=(M + 1) * B * N * H * (width * D + 4),
        quick=quick,
    )
