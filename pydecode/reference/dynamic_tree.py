"""EAGLE-2's rerank: the best nodes of a drafted beam (Li et al., EMNLP 2024, section 4.2).

The value of a node is the sum of the draft's log probabilities along its path. It never rises from
parent to child, so the best nodes are a tree, and ordered by index parents precede children.
"""

import torch
from torch import Tensor

from .ancestors import over_path
from .mask_from_parents import mask_from_parents
from .tree_depths import tree_depths


def dynamic_tree(
    scores: Tensor, tokens: Tensor, parents: Tensor, num_nodes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scores, tokens, parents [B, M] -> parents, depths [B, K], mask [B, K, W], choice [B, K]."""
    B, M = scores.shape
    i = torch.arange(M, device=scores.device)
    parents = parents.long().expand(B, M)

    # an entry is there if its whole path is, down to node 0
    there = (i == 0) | ((tokens >= 0) & (parents >= 0) & (parents < i))
    # node 0 ends every walk, whatever its parent says
    there = over_path(there.long(), parents, torch.minimum, 1) == 1

    # the running minimum along the path: no child outranks its parent, however broken a score is
    value = scores.masked_fill(scores.isnan(), -torch.inf).masked_fill(i == 0, torch.inf)
    value = over_path(value, parents, torch.minimum, torch.inf)

    # the best num_nodes by (there, value, lowest index), then sorted by (there, index)
    order = value.sort(dim=-1, descending=True, stable=True).indices
    order = order.gather(-1, (~there).gather(-1, order).long().sort(dim=-1, stable=True).indices)
    best = order[:, :num_nodes]
    key = torch.where(there.gather(-1, best), best, best + M).sort(-1).values
    choice = key % M

    # the beam's parents become the tree's: where did each entry go?
    place = torch.zeros(B, M, dtype=torch.int64, device=scores.device)
    place.scatter_(-1, choice, torch.arange(num_nodes, device=scores.device).expand(B, num_nodes))
    new_parents = place.gather(-1, parents.gather(-1, choice).clamp(0, M - 1))
    new_parents = new_parents.masked_fill((key >= M) | (choice == 0), -1)
    return new_parents, tree_depths(new_parents), mask_from_parents(new_parents), choice
