"""The ancestor mask of a tree: row i sees itself and its ancestors.

SpecInfer (Miao et al., ASPLOS 2024, section 4.2): row_i = row_parent(i) | bit i.
"""

import torch
from torch import Tensor

from .ancestors import over_path
from .pack_mask import pack_mask


def mask_from_parents(parents: Tensor) -> Tensor:
    """parents [..., T] -> packed int64 [..., T, ceil(T/64)]."""
    T = parents.shape[-1]
    own = pack_mask(torch.eye(T, dtype=torch.bool, device=parents.device)).mT  # [words, T]
    own = own.expand(*parents.shape[:-1], *own.shape)
    return over_path(own, parents[..., None, :], torch.bitwise_or, 0).mT.contiguous()
