"""The tensors of a draft tree as SGLang lays them out: mask, positions and linked lists."""

from enum import IntEnum

import torch
from torch import Tensor

import pydecode

from ...validation import expect_shape


class TreeMaskMode(IntEnum):
    """What ``tree_mask`` is; a plain int does as well."""

    FULL_MASK = 0
    QLEN_ONLY = 1
    QLEN_ONLY_BITPACKING = 2


def build_tree_kernel_efficient(
    parent_list: Tensor,
    selected_index: Tensor,
    verified_seq_len: Tensor,
    tree_mask: Tensor,
    positions: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    topk: int,
    depth: int,
    draft_token_num: int,
    tree_mask_mode: int,
) -> None:
    """Writes an EAGLE tree's mask, positions and lists: ``sgl_kernel.build_tree_kernel_efficient``.

    Node i > 0 is entry ``selected_index[b, i - 1]`` of the draft's history (first topk entries,
    then topk x topk a step). Entries below topk hang on the root, others on the node whose entry is
    ``parent_list[b, entry // topk]``.

    Args:
        parent_list: int64 [bs, topk * (depth - 1) + 1]; [bs, 0] does for depth 1.
        selected_index: int64 [bs, ndt - 1], ascending, as ``organize_draft_results`` gives it.
        verified_seq_len: int64 [bs], the context without the nodes.
        tree_mask: **mutated**, contiguous, a longer buffer's tail stays. FULL_MASK: bool, flat,
            request b has ndt rows of ``verified_seq_len[b] + ndt``; only the last ndt columns are
            written, so the caller fills the prefix with True. QLEN_ONLY: bool, bs x ndt x ndt.
            QLEN_ONLY_BITPACKING: 1, 2 or 4 bytes a row (ndt up to 8, 16, 32) of any dtype, bit j of
            row i little end first; every bit is written, so it need not be zeroed.
        positions: **mutated**, int64 [bs * ndt], ``verified_seq_len`` plus the node's depth.
        retrive_index: **mutated**, int64 [bs, ndt], contiguous, b * ndt + i.
        retrive_next_token, retrive_next_sibling: **mutated**, int64 [bs, ndt], first child and next
            sibling in index order, -1 where a list ends (theirs counts on a prefill of -1).
        topk, depth, draft_token_num (ndt), tree_mask_mode: static.

    A node whose parent was not selected (NaN scores) is in no list, so that no verification accepts
    it or what hangs on it; it sees the root and itself, at the root's position. Theirs prints a
    warning and walks outside its arrays there. A FULL_MASK buffer that is too short for the lengths
    is not written past its end. ndt is not limited to 1024 threads.

    Raises:
        ValueError: shapes, a mask buffer (of the last two modes) or ndt that do not fit.
    """
    B, T = retrive_index.shape
    if draft_token_num != T:
        raise ValueError(f"draft_token_num: expected retrive_index.shape[1] = {T}")
    expect_shape("selected_index", selected_index, (B, T - 1), "[bs, draft_token_num - 1]")
    width = parent_list.shape[1]
    if width not in (0, topk * (depth - 1) + 1):
        raise ValueError(
            f"parent_list: expected topk * (depth - 1) + 1 = {topk * (depth - 1) + 1} columns, "
            f"got {width}"
        )

    parents = _parents(parent_list, selected_index, topk)
    first_child, next_sibling = pydecode.trees.links(parents)
    sees = pydecode.trees.mask_from_parents(parents)
    # all see the root, also without a parent; a slice is not free
    (sees if sees.shape[-1] == 1 else sees[..., :1]).bitwise_or_(1)
    _write_mask(tree_mask, sees, verified_seq_len, tree_mask_mode)
    depths = pydecode.trees.depths(parents)
    torch.add(depths, verified_seq_len.unsqueeze(1), out=positions.view(B, T))
    rows = retrive_index.view(-1)
    torch.arange(B * T, out=rows)
    retrive_next_token.copy_(first_child)
    retrive_next_sibling.copy_(next_sibling)


def reconstruct_indices_from_tree_mask(
    tree_mask: Tensor,
    verified_seq_len: Tensor,
    positions: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    batch_size: int,
    draft_token_num: int,
) -> None:
    """Writes positions and lists from a tree's mask: ``reconstruct_indices_from_tree_mask``.

    A node's parent is the last earlier node that it sees, its depth the number of earlier nodes
    that it sees. For masks of trees (a node sees its parent and what that one sees) all is as
    theirs; entries at and right of the diagonal are not read.

    Args:
        tree_mask: bool, bs x ndt x ndt, flat or not.
        verified_seq_len: int64 [bs]. batch_size, draft_token_num: bs and ndt.
        positions, retrive_index, retrive_next_token, retrive_next_sibling: **mutated**, as
            ``build_tree_kernel_efficient`` writes them.

    Raises:
        ValueError: a mask that is too short, or lists of another shape.
    """
    B, T = batch_size, draft_token_num
    expect_shape("retrive_index", retrive_index, (B, T), "[batch_size, draft_token_num]")
    sees = _head(tree_mask, (B, T, T)).tril(-1)
    last = (sees * torch.arange(1, T + 1, device=sees.device)).amax(-1)
    first_child, next_sibling = pydecode.trees.links(last - 1)
    positions.view(B, T).copy_(sees.sum(-1) + verified_seq_len.unsqueeze(1))
    retrive_index.copy_(torch.arange(B * T, device=sees.device).view(B, T))
    retrive_next_token.copy_(first_child)
    retrive_next_sibling.copy_(next_sibling)


def _parents(parent_list: Tensor, selected_index: Tensor, topk: int) -> Tensor:
    """[bs, ndt]: each node's parent, -1 for the root and where it was not selected."""
    nodes = torch.constant_pad_nd(
        selected_index, (1, 0), -2
    )  # the root as entry -2, which is no other's
    bucket, last = nodes.floor_divide(topk), parent_list.shape[1] - 1
    if last < 0:  # one step: the root's children alone
        return (bucket == 0).long() - 1
    above = parent_list.gather(1, bucket.clamp(0, last)).masked_fill_(bucket == 0, -2)
    selected, parents = (nodes.unsqueeze(1) == above.unsqueeze(2)).max(-1)
    return parents.masked_fill_(~selected, -1)


def _write_mask(tree_mask: Tensor, packed: Tensor, seq_len: Tensor, mode: int) -> None:
    """packed [bs, ndt, words] -> tree_mask."""
    B, T = packed.shape[:2]
    if mode == TreeMaskMode.FULL_MASK:
        _write_full_mask(tree_mask, _unpacked(packed), seq_len)
    elif mode == TreeMaskMode.QLEN_ONLY:
        _head(tree_mask, (B, T, T)).copy_(_unpacked(packed))
    elif mode == TreeMaskMode.QLEN_ONLY_BITPACKING:
        if T > 32:
            raise ValueError(f"draft_token_num: expected at most 32 for packed masks, got {T}")
        size = 1 if T <= 8 else 2 if T <= 16 else 4
        octets = packed >> torch.arange(0, 8 * size, 8, device=packed.device) & 255
        _head(tree_mask.view(torch.uint8), (B, T, size)).copy_(octets)
    else:
        raise ValueError(f"tree_mask_mode: expected 0, 1 or 2, got {mode}")


def _unpacked(packed: Tensor) -> Tensor:
    """Packed [bs, ndt, words] -> bool [bs, ndt, ndt]."""
    T = packed.shape[1]
    if T > 64:
        return pydecode.trees.unpack_mask(packed, T)
    return packed << torch.arange(63, 63 - T, -1, device=packed.device) < 0  # each bit as a sign


def _write_full_mask(tree_mask: Tensor, mask: Tensor, seq_len: Tensor) -> None:
    """mask [bs, ndt, ndt] into the last ndt columns of rows of seq_len + ndt, one after another."""
    T, size, entries = mask.shape[1], tree_mask.numel(), tree_mask.view(-1)
    if size == 0:
        return
    # counted back from each request's end: i rows up, then columns -ndt .. -1
    row = seq_len + T
    back = torch.arange(-T, 0, device=row.device)
    past = torch.add(row, row.cumsum(0), alpha=T)  # one row past the end
    rows = torch.addcmul(past.unsqueeze(1), row.unsqueeze(1), back)
    at = rows.unsqueeze(2) + back
    # what lies outside the buffer stands in for entry 0, with the value that this entry gets
    inside = at == at.clamp(0, size - 1)
    entry_0 = entries[:1] | seq_len[:1].logical_not()
    fresh = torch.where(inside, mask, entry_0)
    entries.scatter_(0, at.mul_(inside).view(-1), fresh.view(-1))


def _head(tree_mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The first entries of a buffer as a view of this shape."""
    size = 1
    for n in shape:
        size *= n
    if tree_mask.numel() < size:
        raise ValueError(
            f"tree_mask: expected at least {' x '.join(map(str, shape))} entries, "
            f"got {tree_mask.numel()}"
        )
    return tree_mask.view(-1)[:size].view(shape)
