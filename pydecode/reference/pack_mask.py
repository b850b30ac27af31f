"""Packed masks: bit j of row i says that row i sees row j, 64 rows a word, little end first."""

import torch
from torch import Tensor


def pack_mask(mask: Tensor) -> Tensor:
    """bool [..., N] -> int64 [..., ceil(N/64)]."""
    n = mask.shape[-1]
    words = -(-n // 64)
    # int64 before the pad: Inductor's C++ backend cannot pad a bool (torch 2.13)
    padded = torch.nn.functional.pad(mask.long(), (0, words * 64 - n)).unflatten(-1, (words, 64))
    bit = torch.arange(64, device=mask.device)
    return (padded << bit).sum(-1)  # bit 63 is the sign; the sum wraps as it should
