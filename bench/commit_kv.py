"""Committing an accepted path: all layers, in place."""

from collections.abc import Iterator

import torch

from .workload import Inputs, Workload

PAGE, Hkv, D = 16, 8, 128


def workloads() -> Iterator[Workload]:
    for layers, B in ((32, 1), (32, 64)):
        yield workload(layers, B, 5, torch.bfloat16, quick=B == 1)


def workload(
    layers: int, B: int, accepted: int, dtype: torch.dtype, *, quick: bool = False
) -> Workload:
    pages = 8  # 128 positions a request

    def make(device: torch.device) -> Inputs:
        caches = torch.randn(2, layers, B * pages, PAGE, Hkv, D, dtype=dtype, device=device)
        table = torch.randperm(B * pages, device=device).view(B, pages).int()
        path = (2 * torch.arange(accepted + 1, dtype=torch.int32, device=device)).expand(B, -1)
        num_accepted = torch.full((B,), accepted, dtype=torch.int32, device=device)
        lengths = torch.full((B,), 37, dtype=torch.int32, device=device)
        args = (caches[0], caches[1], path.contiguous(), num_accepted)
        return args, dict(cache_seqlens=lengths, block_table=table)

    width = torch.finfo(dtype).bits // 8
    moved = 2 * 2 * layers * B * accepted * Hkv * D * width  # K and V, read and written
    label = f"layers={layers} B={B} accepted={accepted} heads={Hkv} D={D}"
    return Workload("commit_kv", label, dtype, make, bytes=moved, quick=quick)
