"""A tree given by its lists (first child, next sibling) as parents, its nodes put in order.

Seen as left child and right sibling, every node but the root has one link that leads to it, and the
number of links from the root grows from a parent to its children and along a list of siblings: a
sort by it is an order in which parents come first and siblings keep their list's order.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


def tree_from_links(first_child: Tensor, next_sibling: Tensor) -> tuple[Tensor, Tensor]:
    """first_child, next_sibling [..., T] -> parents [..., T] of the new nodes, order [..., T]."""
    T = first_child.shape[-1]
    i = torch.arange(T, device=first_child.device)

    # the link that leads to each node: x's to its child is 2x, to its sibling 2x + 1; the lowest
    # one counts, none leads to the root, and the root has no sibling
    links = torch.stack([first_child.long(), next_sibling.long()], -1).flatten(-2)
    k = torch.arange(2 * T, device=links.device)
    counts = (links > 0) & (links < T) & (links != k // 2) & (k != 1)
    link = links.new_full((*links.shape[:-1], T + 1), 2 * T)
    link.scatter_reduce_(-1, torch.where(counts, links, T), k.expand_as(links), "amin")
    link = link[..., :T]
    before = link // 2  # T: none

    # links from the root, and the head of each node's list, by pointer doubling
    head = torch.where(link % 2 == 1, before, i)
    jump = pad(torch.where(i == 0, 0, before), (0, 1), value=T)
    depth = pad((i > 0).long().expand_as(before), (0, 1))
    reach = 1
    while reach < T:
        depth = depth + depth.gather(-1, jump)
        jump, head = jump.gather(-1, jump), head.gather(-1, head)
        reach *= 2
    there = jump[..., :T] == 0  # else the walk ends elsewhere, or never
    parents = before.gather(-1, head).clamp(max=T - 1)

    # the new order, and where each node went
    order = torch.where(there, depth[..., :T], T).sort(dim=-1, stable=True).indices
    place = torch.zeros_like(order).scatter_(-1, order, i.expand_as(order))
    absent = ~there.gather(-1, order)
    parents = place.gather(-1, parents).gather(-1, order)
    return parents.masked_fill(absent | (order == 0), -1), order.masked_fill(absent, -1)
