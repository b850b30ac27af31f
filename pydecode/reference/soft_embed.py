"""Soft embeddings of masked positions: latent refinement decoding (LRD, eqs. 3-5).

e_i = (1 - a_i) E[mask] + a_i sum_{v in top-p} p(v) E[v], a_i = ratio (1 - H_i / log V).
"""

import math

import torch
from torch import Tensor

from .laws import Filters, filtered_support, usable_logits
from .numbers import compute_dtype, per_request
from .row_sampling import entropy_of
from .sample_and_score import as_requests


def soft_embed(
    logits: Tensor,
    embedding: Tensor,
    mask_id: int,
    top_p: float,
    top_p_tensor: Tensor | None,
    ratio: float,
    ratio_tensor: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """logits [..., V], embedding [V, E] -> embeddings [..., E], entropy [...]."""
    rows, V = logits.shape[:-1], logits.shape[-1]
    x, good = usable_logits(as_requests(logits))
    x = torch.where(good[..., None], x, 0.0)
    B = x.shape[0]
    entropy = entropy_of(x.log_softmax(-1))  # of the whole law

    off = top_p_tensor is None and top_p >= 1
    share = None if off else per_request(top_p, top_p_tensor, B, x, x.dtype)
    support = filtered_support(x, Filters(x.new_ones(B), None, share, None))
    p = x.masked_fill(~support, -torch.inf).softmax(-1)

    sure = 1 - entropy / math.log(V) if V > 1 else torch.ones_like(entropy)
    a = per_request(ratio, ratio_tensor, B, x, x.dtype)[:, None] * sure
    table = embedding[:V].to(torch.promote_types(x.dtype, compute_dtype(embedding.dtype)))
    a = torch.where(good, a, 0.0).to(table.dtype)[..., None]
    # a product a request, on memory of its own: a larger one, or another alignment, has other bits
    products = [p_b.to(table.dtype, copy=True) @ table for p_b in p.unbind(0)]
    mean = torch.stack(products) if B else a * table[:1]
    mask = embedding[mask_id].to(table.dtype)
    result = torch.where(a == 0, mask, (1 - a) * mask + a * mean)
    return (
        result.to(embedding.dtype).reshape(*rows, embedding.shape[1]),
        torch.where(good, entropy, torch.nan).reshape(rows),
    )
