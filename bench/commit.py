"""Commit rules over scores that a caller already has."""

from collections.abc import Iterator

import torch

from .workload import Inputs, Workload


def workloads() -> Iterator[Workload]:
    for rule in ("threshold", "top_k", "segments"):
        yield workload(64, 32, rule, quick=rule == "threshold")
    yield workload(8, 1024, "factor")


def workload(B: int, L: int, rule: str, *, quick: bool = False) -> Workload:
    def make(device: torch.device) -> Inputs:
        tokens = torch.zeros(B, L, dtype=torch.int64, device=device)
        proposals = torch.randint(1, 1000, (B, L), device=device)
        return (tokens, proposals, torch.rand(B, L, device=device)), dict(mask_id=0, rule=rule)

    label = f"{rule} B={B} L={L}"
    return Workload("commit", label, torch.float32, make, bytes=B * L * 33, quick=quick)
