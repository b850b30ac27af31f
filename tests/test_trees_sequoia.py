"""Sequoia's optimal tree against all trees there are."""

import functools
import itertools
import math
from typing import Any

import pytest
import torch

from pydecode import trees


def worth(parents: tuple[int, ...], acc: list[list[float]]) -> float:
    """Sum over nodes of the product of acc[depth - 1][rank] over the path; -inf: not allowed."""
    total, value, depth, born = 1.0, [1.0], [0], [0] * len(parents)
    for i, p in enumerate(parents[1:], 1):
        depth.append(depth[p] + 1)
        if depth[i] > len(acc) or born[p] >= len(acc[0]):
            return -math.inf
        value.append(value[p] * acc[depth[p]][born[p]])
        born[p] += 1
        total += value[i]
    return total


def best_worth(m: int, acc: list[list[float]]) -> float:
    """The best of all trees of m nodes: parents run over everything that precedes its child."""
    choices = itertools.product(*(range(i) for i in range(1, m)))
    return max(worth((-1, *parents), acc) for parents in choices)


def recursion(m: int, acc: list[list[float]]) -> float:
    """The best tree by another recursion: one child's share of the nodes at a time."""

    @functools.cache
    def tree(m: int, d: int) -> float:  # m nodes, the root at depth d
        return 1.0 + forest(m - 1, d, 0) if m else -math.inf

    @functools.cache
    def forest(m: int, d: int, b: int) -> float:  # m nodes in the children b, b + 1, .. at d + 1
        if m == 0:
            return 0.0
        if d == len(acc) or b == len(acc[0]):
            return -math.inf
        shares = ((tree(x, d + 1), forest(m - x, d, b + 1)) for x in range(1, m + 1))
        return max((acc[d][b] * t + rest for t, rest in shares), default=-math.inf)

    return tree(m, 0)


def expect_optimal(m: int, acc: list[list[float]], best: float, given: Any) -> None:
    if best == -math.inf:
        with pytest.raises(ValueError, match="num_nodes: expected a tree within max_depth"):
            trees.optimal(given, num_nodes=m, max_depth=len(acc))
        return
    parents = trees.optimal(given, num_nodes=m, max_depth=len(acc))
    assert (parents.shape, parents.dtype) == ((1, m), torch.int64)
    listed = tuple(parents[0].tolist())
    assert listed[0] == -1
    assert all(0 <= p < i for i, p in enumerate(listed[1:], 1))
    assert math.isclose(worth(listed, acc), best, rel_tol=1e-12)
    assert math.isclose(trees.expected_tokens(parents, given), best, rel_tol=1e-12)


@pytest.mark.parametrize("m", range(1, 8))
@pytest.mark.parametrize("max_depth", range(4))
@pytest.mark.parametrize("bmax", [1, 2, 4])
def test_optimal_is_the_best_of_all_trees(m: int, max_depth: int, bmax: int) -> None:
    acc = (torch.rand(bmax + 1, dtype=torch.float64).softmax(0) * 1.5)[:bmax].clamp(max=1).tolist()
    by_depth = [acc] * max_depth
    expect_optimal(m, by_depth, best_worth(m, by_depth) if max_depth or m == 1 else -math.inf, acc)


@pytest.mark.parametrize("m", [2, 5, 7])
@pytest.mark.parametrize("max_depth", [1, 3, 4])
def test_optimal_by_depth(m: int, max_depth: int) -> None:
    acc = torch.rand(max_depth, 3, dtype=torch.float64)
    expect_optimal(m, acc.tolist(), best_worth(m, acc.tolist()), acc)


@pytest.mark.parametrize(("m", "max_depth", "bmax"), [(24, 4, 5), (40, 6, 3), (31, 4, 2)])
def test_optimal_against_another_recursion(m: int, max_depth: int, bmax: int) -> None:
    acc = torch.rand(max_depth, bmax, dtype=torch.float64)
    # (31, 4, 2) is the complete binary tree, the only one with 31 nodes
    expect_optimal(m, acc.tolist(), recursion(m, acc.tolist()), acc)
    flat = acc[0].tolist()
    expect_optimal(m, [flat] * max_depth, recursion(m, [flat] * max_depth), flat)


def test_optimal_of_known_shapes() -> None:
    assert trees.optimal([0.9], num_nodes=4).tolist() == [[-1, 0, 1, 2]]  # one child: a chain
    assert trees.optimal([0.5, 0.4], num_nodes=3, max_depth=1).tolist() == [[-1, 0, 0]]
    for max_depth in (1, 2, 3):  # worthless nodes, still a tree within its bounds
        expect_optimal(4, [[0.0] * 3] * max_depth, 1.0, [0.0] * 3)
        expect_optimal(5, [[0.0] * 3] * max_depth, 1.0 if max_depth > 1 else -math.inf, [0.0] * 3)
    assert trees.optimal([], num_nodes=1).tolist() == [[-1]]
    assert trees.optimal([[0.5, 0.5], [0.1, 0.1]], num_nodes=7).shape == (1, 7)  # depth from rows
    parents = trees.optimal([0.6, 0.2, 0.1], num_nodes=128, max_depth=10)
    assert int(trees.depths(parents).max()) <= 10


def test_expected_tokens() -> None:
    assert trees.expected_tokens([-1], [0.5]) == 1.0
    assert trees.expected_tokens(torch.tensor([[-1, 0, 0, 1]]), [0.5, 0.25]) == 2.0
    assert trees.expected_tokens([-1, 0, 0, 0], [0.5, 0.25]) == 1.75  # no third rank
    assert trees.expected_tokens([-1, 0, 1], [[0.5]]) == 1.5  # no second depth
    assert trees.expected_tokens([-1, -1, 1, 5], [0.5]) == 1.0  # what hangs nowhere is worth 0


@pytest.mark.parametrize(
    ("acceptance", "sizes", "message"),
    [
        ([0.5, 1.5], dict(num_nodes=2), r"acceptance: .*\[0, 1\]"),
        ([math.nan], dict(num_nodes=2), r"acceptance: .*\[0, 1\]"),
        (0.5, dict(num_nodes=2), "acceptance: expected shape"),
        ([[0.5]], dict(num_nodes=4, max_depth=2), "acceptance: expected a row for each"),
        ([0.5], dict(num_nodes=0), "num_nodes: .*>= 1"),
        ([0.5], dict(num_nodes=2, max_depth=-1), "max_depth: .*>= 0"),
        ([0.5], dict(num_nodes=4, max_depth=2), "num_nodes: expected a tree"),
    ],
)
def test_bad_acceptance(acceptance: Any, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trees.optimal(acceptance, **sizes)
