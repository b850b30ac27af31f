"""Remasking the least sure tokens."""

from collections.abc import Iterator

import torch

from .workload import Inputs, Workload


def workloads() -> Iterator[Workload]:
    for B, L in ((64, 32), (8, 1024)):
        yield workload(B, L, quick=L == 32)


def workload(B: int, L: int, *, quick: bool = False) -> Workload:
    def make(device: torch.device) -> Inputs:
        tokens = torch.randint(1, 1000, (B, L), device=device)
        return (tokens, torch.rand(B, L, device=device)), dict(r=4, mask_id=0)

    label = f"B={B} L={L}"
    return Workload("remask", label, torch.float32, make, bytes=B * L * 20, quick=quick)
