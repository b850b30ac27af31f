"""Packed masks: bit j of row i says that row i sees row j, 64 rows a word, little end first.

Every tree op counts a parent if it precedes its child (0 <= parent < own index). Any other parent
(-1, one past the tree, the node itself, a later node) ends the walk: the node is a root.
"""

from typing import Any

import torch
from torch import Tensor

from .. import binding
from ..backends import choose, unavailable
from ..reference import attention
from ..reference import mask_from_parents as parents_reference
from ..reference import pack_mask as pack_reference
from ..reference import tree_depths as depths_reference
from ..replay import replayed
from ..validation import (
    INTS,
    checking,
    data_at_most,
    data_range,
    expect_dtype,
    expect_shape,
    expect_tensor,
)

HAS = ("reference", "triton")

pack_bits = pack_reference.pack_mask  # bool [..., N] -> int64 [..., ceil(N/64)], unvalidated


@replayed
def pack_mask(mask: Tensor, *, backend: str | None = None) -> Tensor:
    """Packs a bool mask into the bits that the attention ops read.

    Word w of row i holds ``sum_j mask[i, 64 w + j] << j`` (bit 63 is int64's sign); bits past N
    are 0.

    Args:
        mask: bool [..., N, N]; entry (i, j): row i sees row j. Any strides.

    Returns:
        int64 [..., N, ceil(N/64)].

    Raises:
        ValueError, TypeError: a mask that is not square or not bool.

    >>> import torch, pydecode
    >>> pydecode.trees.pack_mask(torch.ones(3, 3, dtype=torch.bool).tril())
    tensor([[1],
            [3],
            [7]])
    """
    mask = expect_tensor("mask", mask)
    expect_dtype("mask", mask, (torch.bool,))
    if mask.dim() < 2 or mask.shape[-1] != mask.shape[-2]:
        raise ValueError(f"mask: expected shape [..., N, N], got {list(mask.shape)}")
    return binding.call(_pack_op, _pack_run, mask, choose("pack_mask", backend, HAS, mask))


def unpack_mask(packed: Tensor, n: int) -> Tensor:
    """The bool mask of a packed one, ``pack_mask``'s inverse; bits past n are dropped.

    Args:
        packed: int64 [..., ceil(n/64)].
        n: the number of rows that the bits stand for.

    Returns:
        bool [..., n].

    Raises:
        ValueError, TypeError: a packed mask that does not have ceil(n/64) int64 words a row.

    >>> import torch, pydecode
    >>> pydecode.trees.unpack_mask(torch.tensor([[1], [3]]), 2)
    tensor([[ True, False],
            [ True,  True]])
    """
    packed = expect_tensor("packed", packed)
    expect_dtype("packed", packed, (torch.int64,))
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise ValueError(f"n: expected an int >= 0, got {n!r}")
    expect_shape("packed", packed, (*packed.shape[:-1], -(-n // 64)), "[..., ceil(n/64)]")
    return attention.unpack_mask(packed, n)


@replayed
def mask_from_parents(parents: Tensor, *, backend: str | None = None) -> Tensor:
    """The packed mask of a tree: row i sees itself and its ancestors.

    ``row_i = row_parent(i) | 1 << i`` (SpecInfer, Miao et al., ASPLOS 2024, section 4.2).

    Args:
        parents: int32 or int64 [..., T] (usually [B, T] or [1, T]), parents[0] = -1. A parent that
            does not precede its child ends the walk: a node without a valid parent is a root, and
            several roots make a forest.

    Returns:
        int64 [..., T, ceil(T/64)], the ``mask`` of ``tree_attention``.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit; under ``pydecode.checks(True)``
            also a parent that is not in [-1, own index).

    >>> import torch, pydecode
    >>> parents = torch.tensor([[-1, 0, 0, 1]])
    >>> pydecode.trees.mask_from_parents(parents)
    tensor([[[ 1],
             [ 3],
             [ 5],
             [11]]])
    """
    parents = expect_parents(parents)
    chosen = choose("mask_from_parents", backend, HAS, parents)
    return binding.call(_mask_op, _mask_run, parents, chosen)


def depths(parents: Tensor, *, backend: str | None = None) -> Tensor:
    """The depth of every node: the number of its ancestors, 0 for a root.

    A node's rotary position is the root's plus its depth.

    Args:
        parents: int32 or int64 [..., T], parents[0] = -1. A parent that does not precede its child
            ends the walk: that node counts as a root, at depth 0.

    Returns:
        int64 [..., T].

    Raises:
        ValueError, TypeError: as ``mask_from_parents``.

    >>> import torch, pydecode
    >>> pydecode.trees.depths(torch.tensor([[-1, 0, 0, 1]]))
    tensor([[0, 1, 1, 2]])
    """
    parents = expect_parents(parents)
    return binding.call(_depths_op, _depths_run, parents, choose("tree_depths", backend))


def expect_parents(parents: Any) -> Tensor:
    parents = expect_tensor("parents", parents)
    expect_dtype("parents", parents, INTS)
    if parents.dim() == 0:
        raise ValueError("parents: expected shape [..., T], got []")
    if checking():
        T = parents.shape[-1]
        before = torch.arange(T, device=parents.device) - 1
        data_range("parents", parents, -1, T)
        data_at_most("parents", parents, before, "expected every parent before its child")
    return parents


# ---- backends -----------------------------------------------------------------------------------


def _pack_run(mask: Tensor, backend: str) -> Tensor:
    if backend == "reference":
        return pack_reference.pack_mask(mask)
    if backend == "triton":
        from ..triton_kernels import pack_mask as triton

        return triton.pack_mask(mask)
    raise unavailable("pack_mask", backend, HAS)


def _mask_run(parents: Tensor, backend: str) -> Tensor:
    if backend == "reference":
        return parents_reference.mask_from_parents(parents)
    if backend == "triton":
        from ..triton_kernels import mask_from_parents as triton

        return triton.mask_from_parents(parents)
    raise unavailable("mask_from_parents", backend, HAS)


def _depths_run(parents: Tensor, backend: str) -> Tensor:
    if backend == "reference":
        return depths_reference.tree_depths(parents)
    raise unavailable("tree_depths", backend)


def _pack_fake(mask: Tensor, backend: str) -> Tensor:
    n = mask.shape[-1]
    return mask.new_empty((*mask.shape[:-1], -(-n // 64)), dtype=torch.int64)


def _mask_fake(parents: Tensor, backend: str) -> Tensor:
    T = parents.shape[-1]
    return parents.new_empty((*parents.shape, -(-T // 64)), dtype=torch.int64)


def _depths_fake(parents: Tensor, backend: str) -> Tensor:
    return parents.new_empty(parents.shape, dtype=torch.int64)


_pack_op = binding.bind("pack_mask", _pack_run, _pack_fake)
_mask_op = binding.bind("mask_from_parents", _mask_run, _mask_fake)
_depths_op = binding.bind("tree_depths", _depths_run, _depths_fake)
