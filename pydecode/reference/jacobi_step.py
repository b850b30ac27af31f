"""One Jacobi iteration's bookkeeping (Song et al., ICML 2021; Santilli et al., ACL 2023)."""

import torch
from torch import Tensor

from .numbers import per_request


def jacobi_step(
    draft: Tensor, target: Tensor, num_valid: int, num_valid_tensor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """draft, target [B, n] -> num_accepted [B] int32, next_draft [B, n], converged bool [B]."""
    B, n = draft.shape
    if n == 0:
        yes = torch.ones(B, dtype=torch.bool, device=draft.device)
        return yes.int() * 0, draft.clone(), yes
    valid = per_request(num_valid, num_valid_tensor, B, draft, torch.int64).clamp(1, n)[:, None]
    j = torch.arange(n, device=draft.device)

    # the run of rows whose guess of the next token is what the model says
    wrong = (draft[:, 1:] != target[:, :-1]) | (j[1:] >= valid)
    num_accepted = (wrong.cumsum(1) == 0).sum(1, keepdim=True)
    next_draft = target.gather(1, torch.minimum(num_accepted + j, valid - 1)).to(draft.dtype)
    converged = num_accepted == valid - 1
    return num_accepted[:, 0].int(), next_draft, converged[:, 0]
