"""EAGLE-2's choice of the best nodes of a drafted beam."""

from collections.abc import Iterator

import torch

from .tree_attention import random_tree
from .workload import Inputs, Workload


def workloads() -> Iterator[Workload]:
    for B in (1, 64):
        yield workload(B, 60, 32, quick=B == 1)


def workload(B: int, T: int, nodes: int, *, quick: bool = False) -> Workload:
    def make(device: torch.device) -> Inputs:
        scores = -torch.rand(B, T, device=device).cumsum(-1)
        tokens = torch.randint(0, 1000, (B, T), device=device)
        parents = torch.stack([random_tree(T) for _ in range(B)]).to(device)
        return (scores, tokens, parents), dict(num_nodes=nodes, max_depth=8)

    label = f"B={B} T={T} nodes={nodes}"
    moved = 20 * B * T + 32 * B * nodes
    return Workload("dynamic_tree", label, torch.float32, make, bytes=moved, quick=quick)
