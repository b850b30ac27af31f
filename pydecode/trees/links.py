"""Trees as engines link them, first child and next sibling, to our parents and back."""

from typing import Any

import torch
from torch import Tensor

from .. import binding
from ..backends import choose, unavailable
from ..reference import tree_from_links as from_links_reference
from ..reference import tree_links as links_reference
from ..validation import (
    INTS,
    checking,
    data_range,
    expect_device,
    expect_dtype,
    expect_shape,
    expect_tensor,
)
from .masks import expect_parents


def from_links(
    first_child: Tensor, next_sibling: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The parents of a tree that is linked by lists, and the order in which its nodes come then.

    Engines that keep a list of children a node (SGLang, TensorRT-LLM) try siblings in the order of
    the list, wherever in the tree they lie. Verification tries them in index order, so the nodes
    are renumbered: by the number of links from the root, ties by index. Then parents precede their
    children and siblings keep the order of their list.

    Args:
        first_child: int32 or int64 [..., T] (usually [B, T]), the first of a node's children. Node
            0 is the root.
        next_sibling: [..., T], the next child of the node's parent. A link outside [1, T), or to
            the node itself, ends the list. Of several links to one node the one from the lowest
            node counts, its first_child before its next_sibling.

    Returns:
        parents: int64 [..., T], of the new nodes, -1 for the root.
        order: int64 [..., T], new node i is the old node order[i], so tokens are
            ``tokens.gather(-1, order.clamp(min=0))`` and ``order`` picks rows (``row_index``). A
            node that no walk from the root reaches (unlinked, on a cycle, below such a one) is
            absent: the last entries of parents and order are -1 in its place.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, by name; under
            ``pydecode.checks(True)`` also a link outside [-1, T) or a second link to a node.
        BackendUnavailable: the named backend cannot run this call.

    >>> import torch, pydecode
    >>> first_child = torch.tensor([[3, -1, -1, 1]])  # the root's children are 3, then 2
    >>> next_sibling = torch.tensor([[-1, -1, -1, 2]])
    >>> pydecode.trees.from_links(first_child, next_sibling)
    (tensor([[-1,  0,  1,  0]]), tensor([[0, 3, 1, 2]]))
    """
    first_child = _expect_links("first_child", first_child)
    next_sibling = _expect_links("next_sibling", next_sibling)
    expect_shape("next_sibling", next_sibling, first_child.shape, "that of first_child")
    expect_device("next_sibling", next_sibling, first_child.device)
    if checking():
        _check_links(first_child, next_sibling)
    args = (first_child, next_sibling, choose("tree_from_links", backend))
    return binding.call(_from_links_op, _from_links_run, *args)


def links(parents: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Each node's first child and next sibling, in index order: what ``from_links`` reads.

    Args:
        parents: int32 or int64 [..., T], parents[0] = -1. A node whose parent does not precede it
            is nobody's child; lists below it stay.

    Returns:
        first_child, next_sibling: int64 [..., T], -1 where a list ends.

    Raises:
        ValueError, TypeError: as ``trees.mask_from_parents``.
        BackendUnavailable: the named backend cannot run this call.

    >>> import torch, pydecode
    >>> pydecode.trees.links(torch.tensor([[-1, 0, 0, 1]]))
    (tensor([[ 1,  3, -1, -1]]), tensor([[-1,  2, -1, -1]]))
    """
    parents = expect_parents(parents)
    return binding.call(_links_op, _links_run, parents, choose("tree_links", backend))


def _expect_links(name: str, x: Any) -> Tensor:
    x = expect_tensor(name, x)
    expect_dtype(name, x, INTS)
    if x.dim() == 0:
        raise ValueError(f"{name}: expected shape [..., T], got []")
    return x


def _check_links(first_child: Tensor, next_sibling: Tensor) -> None:
    T = first_child.shape[-1]
    data_range("first_child", first_child, -1, T)
    data_range("next_sibling", next_sibling, -1, T)
    ordered = torch.cat([first_child.long(), next_sibling.long()], -1).sort(-1).values
    twice = ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).nonzero()
    if twice.numel():
        index = twice[0].tolist()
        raise ValueError(
            f"first_child, next_sibling: expected at most one link to each node, got several to "
            f"node {int(ordered[..., 1:][tuple(index)])} at index {index[:-1]}"
        )


# ---- backends -----------------------------------------------------------------------------------


def _from_links_run(
    first_child: Tensor, next_sibling: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return from_links_reference.tree_from_links(first_child, next_sibling)
    raise unavailable("tree_from_links", backend)


def _links_run(parents: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return links_reference.tree_links(parents)
    raise unavailable("tree_links", backend)


def _from_links_fake(
    first_child: Tensor, next_sibling: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return _links_fake(first_child, backend)


def _links_fake(parents: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    shape = parents.shape
    return parents.new_empty(shape, dtype=torch.int64), parents.new_empty(shape, dtype=torch.int64)


_from_links_op = binding.bind("tree_from_links", _from_links_run, _from_links_fake)
_links_op = binding.bind("tree_links", _links_run, _links_fake)
