"""Sequoia's optimal static tree, by dynamic programming on the host."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .tree import expect_int


def optimal(
    acceptance: Tensor | Sequence[Any],
    *,
    num_nodes: int,
    max_depth: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The tree of ``num_nodes`` nodes with the most expected tokens (Sequoia), on the host.

    With acc_b the probability that a node's b-th child is the one accepted, a tree is worth
    ``F = sum over nodes of the product of acc over the path``. T(m, l, b), the best tree of m nodes
    and depth at most l whose root has b children, is::

        T(1, l, 0) = 1
        T(m, l, b) = max over y of T(y, l, b - 1) + acc_b * max over b' of T(m - y, l - 1, b')

    (Sequoia, Chen et al., NeurIPS 2024, section 3.1). Cost: num_nodes^2 * max_depth * bmax on the
    CPU; build once, keep the tree.

    Args:
        acceptance: [bmax], or [depths, bmax] where row d - 1 is for children at depth d (depths >=
            the tree's); numbers in [0, 1], measured with the verification rule in use.
        num_nodes: T >= 1, the root included.
        max_depth: no node is deeper (the root's depth is 0). None: num_nodes - 1, or the number of
            rows of a 2-d ``acceptance`` if that is less.

    Returns:
        int64 [1, T] parents by depth, siblings in the order of acceptance; the best tree has
        exactly T nodes. ``mask_from_parents`` and ``depths`` make the rest.

    Raises:
        ValueError, TypeError: a number out of range, by name; a tree of num_nodes nodes that does
            not exist within max_depth and bmax.

    >>> import pydecode
    >>> parents = pydecode.trees.optimal([0.5, 0.25], num_nodes=4, max_depth=2)
    >>> parents, pydecode.trees.expected_tokens(parents, [0.5, 0.25])
    (tensor([[-1,  0,  0,  1]]), 2.0)
    """
    acc = _acceptance(acceptance)
    T = expect_int("num_nodes", num_nodes, 1)
    if max_depth is None:
        max_depth = min(T - 1, acc.shape[0] if acc.dim() == 2 else T - 1)
    L = min(expect_int("max_depth", max_depth, 0), T - 1)
    acc = _by_depth(acc, L)
    bmax = acc.shape[1]

    # T(m, l, b) and where its maximum was. l is the depth still allowed, so that the children of
    # such a node lie at depth L - l + 1.
    rest = torch.arange(T + 1)[:, None] - torch.arange(T + 1)  # m - y
    best = torch.full((L + 1, T + 1), -torch.inf, dtype=torch.float64)
    taken = torch.zeros(L + 1, bmax + 1, T + 1, dtype=torch.int64)
    branches = torch.zeros(L + 1, T + 1, dtype=torch.int64)
    for l in range(L + 1):
        value = torch.full((bmax + 1, T + 1), -torch.inf, dtype=torch.float64)
        value[0, 1] = 1.0
        for b in range(1, bmax + 1 if l else 1):
            below = best[l - 1]
            # 0 * -inf: a child that does not exist is worth -inf, also where acc is 0
            child = torch.where(below.isinf(), -torch.inf, acc[L - l, b - 1] * below)
            sums = torch.where(rest > 0, value[b - 1] + child[rest.clamp(min=0)], -torch.inf)
            value[b], taken[l, b] = sums.max(1)
        best[l], branches[l] = value.max(0)
    if best[L, T] == -torch.inf:
        raise ValueError(
            f"num_nodes: expected a tree within max_depth = {L} and {bmax} children a node, "
            f"got {T} nodes"
        )

    # unfold the choices: a queue of (node, nodes of its subtree, depth still allowed)
    parents, queue = [-1], [(0, T, L)]
    for node, m, l in queue:
        sizes = []
        for b in range(int(branches[l, m]), 0, -1):
            y = int(taken[l, b, m])
            sizes.append(m - y)
            m = y
        for size in reversed(sizes):
            queue.append((len(parents), size, l - 1))
            parents.append(node)
    return torch.tensor([parents], dtype=torch.int64, device=device)


def expected_tokens(parents: Tensor | Sequence[int], acceptance: Tensor | Sequence[Any]) -> float:
    """Expected tokens a step of a tree: the sum over nodes of the product of acc over the path.

    The root counts 1, for the correction or bonus that every step emits (Sequoia, section 3.1).
    Synchronises: it is a host function.

    Args:
        parents: int [T] or [1, T], each parent before its child; siblings in the order of
            acceptance. A node without a valid parent, other than node 0, is worth nothing.
        acceptance: as for ``optimal``; a child past its last column, or a depth past its last row,
            is worth nothing.

    >>> import pydecode
    >>> pydecode.trees.expected_tokens([-1, 0, 0], [0.5, 0.25])
    1.75
    """
    acc = _acceptance(acceptance)
    listed = torch.as_tensor(parents).reshape(-1).tolist()
    by_depth = _by_depth(acc, acc.shape[0] if acc.dim() == 2 else len(listed)).tolist()
    value, depth, children = [1.0], [0], [0] * len(listed)
    for node, parent in enumerate(listed[1:], 1):
        if not 0 <= parent < node:
            value.append(0.0)
            depth.append(0)
            continue
        depth.append(depth[parent] + 1)
        rank = children[parent]
        children[parent] += 1
        inside = depth[node] <= len(by_depth) and rank < len(by_depth[0])
        value.append(value[parent] * by_depth[depth[node] - 1][rank] if inside else 0.0)
    return float(sum(value[: len(listed)]))


def _acceptance(acceptance: Any) -> Tensor:
    acc = torch.as_tensor(acceptance, dtype=torch.float64, device="cpu").detach()
    if acc.dim() not in (1, 2):
        raise ValueError(
            f"acceptance: expected shape [bmax] or [depths, bmax], got {list(acc.shape)}"
        )
    if not bool(((acc >= 0) & (acc <= 1)).all()):
        raise ValueError(f"acceptance: expected numbers in [0, 1], got {acc.tolist()}")
    return acc


def _by_depth(acc: Tensor, max_depth: int) -> Tensor:
    """acceptance as [max_depth, bmax]: row d - 1 is for children at depth d."""
    if acc.dim() == 1:
        return acc.expand(max_depth, -1)
    if acc.shape[0] < max_depth:
        raise ValueError(
            f"acceptance: expected a row for each of max_depth = {max_depth} depths, "
            f"got {acc.shape[0]}"
        )
    return acc[:max_depth]
