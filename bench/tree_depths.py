"""The depths of a tree's nodes."""

from collections.abc import Iterator

import torch

from .tree_attention import random_tree
from .workload import Inputs, Workload


def workloads() -> Iterator[Workload]:
    for B in (1, 64):
        yield workload(B, 64, quick=B == 1)


def workload(B: int, T: int, *, quick: bool = False) -> Workload:
    def make(device: torch.device) -> Inputs:
        return (torch.stack([random_tree(T) for _ in range(B)]).to(device),), {}

    label = f"B={B} T={T}"
    return Workload("tree_depths", label, torch.int64, make, bytes=16 * B * T, quick=quick)
