"""Depths of a tree's nodes."""

import torch
from torch import Tensor

from .ancestors import over_path


def tree_depths(parents: Tensor) -> Tensor:
    """parents [..., T] -> int64 [..., T]: the number of a node's ancestors."""
    ones = torch.ones_like(parents, dtype=torch.int64)
    return over_path(ones, parents, torch.add, 0) - 1
