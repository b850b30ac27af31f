"""The walk from a node to its root, which the tree ops share.

A parent counts if it precedes its child (0 <= parent < own index); any other ends the walk. So no
walk can cycle, and log2(T) doublings reach every root.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def over_path(
    x: Tensor, parents: Tensor, combine: Callable[[Tensor, Tensor], Tensor], nothing: float
) -> Tensor:
    """``combine`` over each node's x and all its ancestors': x, parents [..., T] -> [..., T].

    ``nothing`` is combine's neutral element; combine must be associative and commutative.
    """
    T = parents.shape[-1]
    i = torch.arange(T, device=parents.device)
    parents = parents.long()
    # jump: each node's 2^k-th ancestor; T stands for none and is its own ancestor
    jump = torch.where((parents >= 0) & (parents < i), parents, T)
    jump = torch.nn.functional.pad(jump, (0, 1), value=T)
    x = torch.nn.functional.pad(x, (0, 1), value=nothing)
    reach = 1  # x already holds the node and its reach - 1 nearest ancestors
    while reach < T:
        x = combine(x, x.gather(-1, jump.expand_as(x)))
        jump = jump.gather(-1, jump)
        reach *= 2
    return x[..., :T]
