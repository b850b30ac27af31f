"""Greedy verification of a tree from logits."""

from collections.abc import Iterator

import torch

from .rejection_sample_tree import make as make_tree
from .workload import Inputs, Workload

V = 128256


def workloads() -> Iterator[Workload]:
    for B, T in ((1, 64), (16, 64)):
        yield workload(B, T, torch.bfloat16, quick=B == 1)


def workload(B: int, T: int, dtype: torch.dtype, *, V: int = V, quick: bool = False) -> Workload:
    def make(device: torch.device) -> Inputs:
        (target, tokens, parents), _ = make_tree(B, T, V, "target_only", dtype, device)
        return (tokens, target), dict(parents=parents)

    width = torch.finfo(dtype).bits // 8
    label = f"tree B={B} T={T} V={V}"
    return Workload("verify_greedy", label, dtype, make, bytes=B * T * V * width, quick=quick)
