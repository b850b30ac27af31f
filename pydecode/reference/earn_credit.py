"""Credit of the tokens that a masked row keeps preferring, as a few ids and amounts a row.

dInfer's credit decoder (inclusionAI/dInfer, parallel_strategy.py at fce4e32): all credit decays,
a row's best token earns p ** gamma, and logits get alpha * log(1 + credit).
"""

import torch
from torch import Tensor


def earn_credit(
    credit_ids: Tensor,
    credit: Tensor,
    tokens: Tensor,
    confidence: Tensor,
    alive: Tensor | None,
    gamma: float,
    decay: float,
    alpha: float,
) -> Tensor:
    """credit_ids, credit [B, L, S], in place; tokens, confidence [B, L] -> bias [B, L, S]."""
    S = credit.shape[2]
    had = credit * decay
    had = torch.where(had > 0, had, 0.0)  # a NaN is no credit
    ids = credit_ids
    if alive is not None:
        some = alive.any(-1) if alive.dim() == 2 else alive
        some = some[:, None, None] if some.dim() else some
        had, ids = torch.where(some, had, 0.0), torch.where(some, ids, -1)

    # the slot of each row's token: the one that it has, else the one of least credit
    s = torch.arange(S, device=credit.device)
    token = tokens.to(ids.dtype)[..., None]
    p = confidence.to(had.dtype)[..., None]
    same = ids == token
    order = torch.where(same, -1.0, had)
    if S:
        slot = torch.where(order == order.amin(-1, True), s, S).amin(-1, True)
        takes = (s == slot) & (token >= 0) & (p > 0)
        earned = torch.where(takes, p, 1.0).pow(gamma)
        had = torch.where(takes, torch.where(same, had, 0.0) + earned, had)
        ids = torch.where(takes, token, ids)
    credit_ids.copy_(ids)
    credit.copy_(had)
    return had.log1p().mul(alpha).contiguous()
