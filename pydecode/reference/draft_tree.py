"""A batch of draft trees as the tree rules read it: the nodes that exist, their laws and coins."""

from typing import NamedTuple

import torch
from torch import Tensor

from .laws import Rows
from .verification import row_sum


class Nodes(NamedTuple):
    """B trees of T nodes; row n of a law belongs to node n."""

    tokens: Tensor  # int64 [B, T], 0 where the id is outside the vocabulary
    parents: Tensor  # int64 [B, T], 0 for nodes that do not exist
    depth: Tensor  # int64 [B, T]
    valid: Tensor  # bool [B, T]: the node exists, and so do all above it
    p: Rows  # the target's law after each node
    q: Rows | None  # the law that each node's children were drawn from; None: deterministic drafts
    greedy: Tensor  # bool [B]: temperature 0
    u: Tensor  # [B, T + 1]: a coin for each node, and one for the last token


class Walked(NamedTuple):
    """What a rule decided."""

    last: Tensor  # int64 [B], the deepest accepted node
    weights: Tensor  # [B, V], the last token's law, up to its sum
    undecided: Tensor  # bool [B]: a row that the rule reads has NaN, or allows nothing


def at(x: Tensor, node: Tensor) -> Tensor:
    """x [B, T, ...] at each request's node [B] -> [B, ...]."""
    return x[torch.arange(x.shape[0], device=x.device), node]


def total(x: Tensor) -> Tensor:
    """Sum of each row, [..., V] -> [..., 1]."""
    return row_sum(x)[..., None]


def residual(p: Tensor, q: Tensor) -> Tensor:
    """norm((p - q)+); a zero residual falls back to p."""
    r = (p - q).clamp(min=0)
    s = total(r)
    return torch.where(s > 0, r / torch.where(s > 0, s, 1.0), p)


def without(q: Tensor, x: Tensor) -> Tensor:
    """q less the token x [B], renormalised; zeros when nothing is left."""
    q = q.scatter(-1, x[:, None], 0.0)
    s = total(q)
    return torch.where(s > 0, q / torch.where(s > 0, s, 1.0), 0.0)


def make_nodes(
    draft_tokens: Tensor,
    parents: Tensor,
    num_drafts: Tensor,
    max_depth: int,
    p: Rows,
    q: Rows | None,
    greedy: Tensor,
    u: Tensor,
) -> Nodes:
    """A node exists if it is the root, or if all of these hold: its index is at most num_drafts,
    its token is in the vocabulary, its parent precedes it and exists and has rows to test it with,
    and it is no deeper than max_depth.
    """
    (B, T), V = draft_tokens.shape, p.p.shape[-1]
    i = torch.arange(T, device=draft_tokens.device)
    x, parents = draft_tokens.long(), parents.long().expand(B, T)
    inside = (x >= 0) & (x < V)
    candidate = inside & (i <= num_drafts[:, None]) & (parents >= 0) & (parents < i)
    parents = torch.where(candidate, parents, 0)
    testable = p.present if q is None else p.present & (q.present | greedy[:, None])
    depth = torch.zeros_like(parents)
    valid = i.expand(B, T) == 0
    for n in range(1, T):
        above = parents[:, n]
        depth[:, n] = at(depth, above) + 1
        exists = candidate[:, n] & at(valid, above) & at(testable, above)
        valid[:, n] = exists & (depth[:, n] <= max_depth)
    tokens = torch.where(inside, x, 0)
    return Nodes(tokens, parents, depth, valid, p, q, greedy, u)


def bad_rows(rows: Rows) -> Tensor:
    """Rows that make a request undecided when they are read; an absent row is none of them."""
    return rows.present & ~rows.good


def path_to(nodes: Nodes, last: Tensor, width: int) -> Tensor:
    """The nodes from the root to ``last``, then -1: int64 [B, width]."""
    B, T = nodes.parents.shape
    depth = at(nodes.depth, last)
    path = torch.full((B, width), -1, dtype=torch.int64, device=last.device)
    j = torch.arange(width, device=last.device)
    node = last
    for up in range(min(width, T)):
        path = torch.where(j == (depth - up)[:, None], node[:, None], path)
        node = at(nodes.parents, node)
    return path
