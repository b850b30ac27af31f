"""Unmasking: CEILINGS table 3.3, a threshold over bf16 logits, one read of them."""

from collections.abc import Iterator

import torch

from .workload import Inputs, Workload

L = 32


def workloads() -> Iterator[Workload]:
    for V in (126464, 151936):
        for B in (1, 4, 8, 32, 64):
            yield workload(B, V, torch.bfloat16, quick=V == 126464 and B in (1, 8))


def workload(B: int, V: int, dtype: torch.dtype, *, quick: bool = False) -> Workload:
    def make(device: torch.device) -> Inputs:
        tokens = torch.full((B, L), V - 1, device=device)
        logits = torch.randn(B, L, V, dtype=dtype, device=device) * 3
        logits[..., V - 1] = -20  # the mask: peers would commit it
        return (tokens, logits), dict(mask_id=V - 1, rule="threshold", threshold=0.9)

    return Workload(
        "unmask",
        f"rows={B * L} V={V} threshold",
        dtype,
        make,
        bytes=B * L * V * torch.finfo(dtype).bits // 8,
        quick=quick,
    )
