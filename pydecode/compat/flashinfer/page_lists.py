"""FlashInfer's page lists (indptr, indices, last_page_len) as block tables and lengths."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Lengths(NamedTuple):
    """What is known of each request, int64 [B] each: views of one tensor [3, B]."""

    rows: Tensor
    keys: Tensor
    context: Tensor  # keys - rows: where the first row's K/V lie; negative if there are more rows


def lengths_of(
    qo_indptr: Tensor, kv_indptr: Tensor, last_page_len: Tensor, page_size: int
) -> Tensor:
    """``Lengths`` as one tensor [3, B]; a request without pages has no keys."""
    rows = qo_indptr[1:] - qo_indptr[:-1]
    pages = kv_indptr[1:] - kv_indptr[:-1]
    keys = torch.add(last_page_len - page_size, pages, alpha=page_size).clamp_(min=0)
    return torch.stack((rows, keys, keys - rows)).long()


def block_table(kv_indptr: Tensor, indices: Tensor, width: int) -> Tensor:
    """[B, width]: row b starts with request b's pages; what follows is some page and not read."""
    if indices.shape[0] == 0:
        return indices.new_zeros(kv_indptr.shape[0] - 1, width)
    at = kv_indptr[:-1, None] + torch.arange(width, device=indices.device)
    return indices[at.clamp_(0, indices.shape[0] - 1)]


def owners(qo_indptr: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Of rows 0 .. total-1: whose each is, and which of its request's; [total] each.

    Rows past qo_indptr's end are counted on behind the last request.
    """
    row = torch.arange(total, dtype=qo_indptr.dtype, device=qo_indptr.device)
    owner = torch.searchsorted(qo_indptr[1:-1], row, right=True)
    return owner, row - qo_indptr[owner]


def on_host(x: Tensor) -> bool:
    """Whether x can be read without a synchronisation."""
    return x.device.type == "cpu"


def host_max(indptr: Tensor) -> int | None:
    """The longest stretch of an indptr, if the host can see it."""
    if not on_host(indptr):
        return None
    return max((last - first for first, last in pairwise(indptr.tolist())), default=0)
