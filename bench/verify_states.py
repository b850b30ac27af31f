"""FreeDave's chain of drafted states."""

from collections.abc import Iterator

import torch

from .workload import Inputs, Workload


def workloads() -> Iterator[Workload]:
    for B in (1, 64):
        yield workload(B, 8, 32, quick=B == 1)


def workload(B: int, K: int, L: int, *, quick: bool = False) -> Workload:
    def make(device: torch.device) -> Inputs:
        states = torch.randint(0, 3, (B, K, L), device=device)
        return (states, states.roll(-1, 1)), dict(mask_id=0)

    label = f"B={B} K={K} L={L}"
    return Workload("verify_states", label, torch.int64, make, bytes=16 * B * K * L, quick=quick)
