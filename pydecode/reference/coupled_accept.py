"""Universal coupling: the verifier's mixture is sampled with the draft's own Gumbel noise.

APD (Israel et al., 2025, section 3): y_i = argmax((R l_D + (1 - R) l_A) / T + g_i) with the g that
drafted x_i = argmax(l_D / T + g_i); the longest prefix with y_i = x_i is accepted.
"""

import torch
from torch import Tensor

from .. import philox
from .laws import usable_logits
from .numbers import compute_dtype, per_request
from .row_sampling import perturbed_argmax, tempered_logits


def coupled_accept(
    draft_logits: Tensor,
    verifier_logits: Tensor,
    tokens: Tensor,
    ratio: float,
    ratio_tensor: Tensor | None,
    temperature: float,
    temperature_tensor: Tensor | None,
    seed: int,
    seed_tensor: Tensor | None,
    offset: int,
    offset_tensor: Tensor | None,
    positions: Tensor | None,
    force_first: bool,
) -> Tensor:
    """Logits [B, M, V], tokens [B, M] -> num_accepted int32 [B]."""
    B, M, V = draft_logits.shape
    dtype = compute_dtype(torch.promote_types(draft_logits.dtype, verifier_logits.dtype))
    draft, draft_good = usable_logits(draft_logits.to(dtype))
    verifier, _ = usable_logits(verifier_logits.to(dtype))
    R = per_request(ratio, ratio_tensor, B, draft, dtype)[:, None, None]
    mixture, good = usable_logits(weighted(R, draft) + weighted(1 - R, verifier))
    mixture = torch.where(good[..., None], mixture, 0.0)

    t = per_request(temperature, temperature_tensor, B, draft, dtype)
    position = torch.arange(M, device=draft.device) if positions is None else positions
    y = perturbed_argmax(
        tempered_logits(mixture, t),
        t,
        philox.request_keys(seed, seed_tensor, B, draft.device),
        per_request(offset, offset_tensor, B, draft, torch.int64),
        position.expand(B, M),
    )

    good = good & draft_good & (t >= 0)[:, None] & (tokens >= 0) & (tokens < V)
    accept = good & (y == tokens)
    if force_first:
        first = torch.arange(M, device=draft.device) == 0
        accept = torch.where(first, good, accept)
    return accept.int().cumprod(-1).sum(-1, dtype=torch.int32)


def weighted(weight: Tensor, x: Tensor) -> Tensor:
    """weight * x; the law to the power 0 is 1 where it is 0 (weight 0 and x = -inf) too."""
    return torch.where((weight == 0) & (x == -torch.inf), 0.0, weight * x)
