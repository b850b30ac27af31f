"""One Jacobi step: the accepted prefix and the next draft."""

from collections.abc import Iterator

import torch

from .workload import Inputs, Workload


def workloads() -> Iterator[Workload]:
    for B, n in ((1, 64), (256, 64)):
        yield workload(B, n, quick=B == 1)


def workload(B: int, n: int, *, quick: bool = False) -> Workload:
    def make(device: torch.device) -> Inputs:
        draft, target = (torch.randint(0, 3, (B, n), device=device) for _ in range(2))
        return (draft, target), {}

    label = f"B={B} n={n}"
    return Workload("jacobi_step", label, torch.int64, make, bytes=3 * B * n * 8, quick=quick)
