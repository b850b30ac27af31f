"""Packing a bool mask into 64-bit words."""

from collections.abc import Iterator

import torch

from .workload import Inputs, Workload


def workloads() -> Iterator[Workload]:
    for B, N in ((1, 64), (64, 64), (1, 1024)):
        yield workload(B, N, quick=(B, N) == (1, 64))


def workload(B: int, N: int, *, quick: bool = False) -> Workload:
    def make(device: torch.device) -> Inputs:
        return (torch.rand(B, N, N, device=device) < 0.5,), {}

    label = f"B={B} N={N}"
    moved = B * N * (N + 8 * -(-N // 64))
    return Workload("pack_mask", label, torch.bool, make, bytes=moved, quick=quick)
