"""Parents and order of a tree of linked lists."""

from collections.abc import Iterator

import torch

from pydecode import trees

from .tree_attention import random_tree
from .workload import Inputs, Workload


def workloads() -> Iterator[Workload]:
    for B in (1, 64):
        yield workload(B, 64, quick=B == 1)


def workload(B: int, T: int, *, quick: bool = False) -> Workload:
    def make(device: torch.device) -> Inputs:
        parents = torch.stack([random_tree(T) for _ in range(B)]).to(device)
        return tuple(trees.links(parents)), {}

    label = f"B={B} T={T}"
    return Workload("tree_from_links", label, torch.int64, make, bytes=32 * B * T, quick=quick)
