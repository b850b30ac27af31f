"""The lists of a tree given by its parents: each node's first child and next sibling."""

import torch
from torch import Tensor


def tree_links(parents: Tensor) -> tuple[Tensor, Tensor]:
    """parents [..., T] -> first_child, next_sibling int64 [..., T], -1 where a list ends."""
    T = parents.shape[-1]
    i = torch.arange(T, device=parents.device)
    parents = torch.where((parents >= 0) & (parents < i), parents.long(), T)  # T: nobody's child
    first = parents.new_full((*parents.shape[:-1], T + 1), T)
    first.scatter_reduce_(-1, parents, i.expand_as(parents), "amin")
    first = first[..., :T]

    # sorted by parent, siblings are neighbours in index order
    parent, node = parents.sort(dim=-1, stable=True)
    siblings = (parent[..., 1:] == parent[..., :-1]) & (parent[..., 1:] < T)
    following = torch.where(siblings, node[..., 1:], -1)
    next_sibling = torch.full_like(node, -1).scatter_(-1, node[..., :-1], following)
    return first.masked_fill(first == T, -1), next_sibling
