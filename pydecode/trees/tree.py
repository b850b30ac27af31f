"""What the builders return."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .masks import depths, mask_from_parents


class _Tensors(NamedTuple):
    parents: Tensor
    depths: Tensor
    mask: Tensor
    choice: Tensor


class Tree(_Tensors):
    """A draft tree: a tuple of four tensors, and a bound on its depth that the host knows.

    Node 0 is the root, the last committed token; parents precede their children.

    parents: int64 [B|1, T], the root's and an unused node's is -1.
    depths: int64 [B|1, T], the number of ancestors.
    mask: packed int64 [B|1, T, ceil(T/64)], the ``mask`` of ``tree_attention``.
    choice: int64, where a node's token comes from; each builder says how.
    max_depth: a Python int, no node is deeper; the ``max_depth`` of the verification ops. None
        stands for T - 1. A tree that went through a pytree map is back at T - 1, also right.
    """

    max_depth: int

    def __new__(
        cls,
        parents: Tensor,
        depths: Tensor,
        mask: Tensor,
        choice: Tensor,
        max_depth: int | None = None,
    ) -> "Tree":
        self = super().__new__(cls, parents, depths, mask, choice)
        self.max_depth = max(parents.shape[-1] - 1, 0) if max_depth is None else max_depth
        return self

    def _replace(self, **tensors: Any) -> "Tree":
        """The same tree with some tensors replaced; the bound on its depth stays."""
        return Tree(**{**self._asdict(), **tensors}, max_depth=self.max_depth)

    @classmethod
    def _make(cls, iterable: Iterable[Any]) -> "Tree":  # type: ignore[override]
        return cls(*iterable)

    def to(self, device: torch.device | str) -> "Tree":
        """The same tree with its tensors on another device."""
        parents, depths, mask, choice = (x.to(device) for x in self)
        return Tree(parents, depths, mask, choice, self.max_depth)


def chain(num_nodes: int, *, device: torch.device | str | None = None) -> Tree:
    """A tree without branches: node i's parent is i - 1, its mask is causal.

    Args:
        num_nodes: T >= 1, the root included.

    Returns:
        Tree with [1, T] tensors; choice [T] is 0, every node is its parent's best.

    >>> import pydecode
    >>> pydecode.trees.chain(3).parents
    tensor([[-1,  0,  1]])
    """
    num_nodes = expect_int("num_nodes", num_nodes, 1)
    return from_host(range(-1, num_nodes - 1), [0] * num_nodes, device)


def from_host(
    parents: Sequence[int], choice: Sequence[int], device: torch.device | str | None
) -> Tree:
    """A tree that the host knows: parents [T] (each before its child) and choice [T]."""
    depth: list[int] = []
    for parent in parents:
        depth.append(depth[parent] + 1 if parent >= 0 else 0)
    tensor = torch.tensor([parents], dtype=torch.int64)
    return Tree(
        tensor.to(device),
        depths(tensor).to(device),
        mask_from_parents(tensor).to(device),
        torch.tensor(choice, dtype=torch.int64).to(device),
        max(depth),
    )


def expect_int(name: str, value: Any, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name}: expected an int >= {minimum}, got {value!r}")
    return value
