"""The r least sure committed tokens become masks again (ReMDM, Wang et al., 2025; RCR)."""

import torch
from torch import Tensor

from .numbers import per_request


def remask(tokens: Tensor, scores: Tensor, r: int, r_tensor: Tensor | None, mask_id: int) -> Tensor:
    """tokens, scores [B, L] -> tokens [B, L]."""
    B, L = tokens.shape
    count = per_request(r, r_tensor, B, tokens, torch.int64)[:, None]
    # NaN first, then ascending scores, masks last; stable, so ties go to the lowest position
    unknown = scores.isnan()
    by_score = scores.masked_fill(unknown, 0).sort(dim=-1, stable=True).indices
    late = torch.where(tokens == mask_id, 2, torch.where(unknown, 0, 1)).to(torch.uint8)
    order = by_score.gather(-1, late.gather(-1, by_score).sort(dim=-1, stable=True).indices)
    rank = torch.arange(L, device=tokens.device).expand_as(order)
    rank = torch.empty_like(order).scatter(-1, order, rank)
    # masks, which come last, may be masked once more
    return tokens.masked_fill(rank < count, mask_id)
