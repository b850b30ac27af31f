"""Medusa's sparse trees, written as paths of ranks."""

from collections.abc import Sequence
from typing import Any

import torch

from .tree import Tree, from_host


def from_choices(
    choices: Sequence[Sequence[int]], *, device: torch.device | str | None = None
) -> Tree:
    """The tree whose nodes are paths of ranks, as Medusa writes its sparse trees.

    Path (i_1, .., i_d) is the node whose token is the i_d-th best (from 0) of draft head d, below
    the node (i_1, .., i_{d-1}) (Medusa, Cai et al., ICML 2024, section 2.2 and appendix).

    Args:
        choices: non-empty paths of ints >= 0, in any order; every prefix of a path must be there.
            No path at all is the tree of the root alone.

    Returns:
        Tree with [1, T] tensors, T = len(choices) + 1: the root, then the paths by length, then
        lexicographic. choice [T] is a node's rank in its own head, so that for topk_ids
        [heads, k] the token of node i >= 1 is ``topk_ids[depths[0, i] - 1, choice[i]]``.

    Raises:
        ValueError: a duplicate, an empty path, a negative rank, a missing prefix (by name).
        TypeError: a rank that is not an int.

    >>> import pydecode
    >>> tree = pydecode.trees.from_choices([(0,), (1,), (0, 0), (0, 1)])
    >>> tree.parents, tree.choice, tree.max_depth
    (tensor([[-1,  0,  0,  1,  1]]), tensor([0, 0, 1, 0, 1]), 2)
    """
    paths = sorted((_path(choice) for choice in choices), key=lambda path: (len(path), path))
    place: dict[tuple[int, ...], int] = {(): 0}
    for i, path in enumerate(paths, 1):
        if path in place:
            raise ValueError(f"choices: expected distinct paths, got {path} twice")
        if path[:-1] not in place:
            raise ValueError(f"choices: expected every prefix, got {path} without {path[:-1]}")
        place[path] = i
    parents = [-1, *(place[path[:-1]] for path in paths)]
    return from_host(parents, [0, *(path[-1] for path in paths)], device)


def _path(choice: Any) -> tuple[int, ...]:
    path = tuple(choice)
    if any(isinstance(rank, bool) or not isinstance(rank, int) for rank in path):
        raise TypeError(f"choices: expected paths of ints, got {choice!r}")
    if not path or min(path) < 0:
        raise ValueError(f"choices: expected non-empty paths of ranks >= 0, got {choice!r}")
    return path
