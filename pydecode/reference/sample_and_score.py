"""A token a row, how sure the model is of it, and the log-sum-exp.

LLaDA (Nie et al., 2025, section 2.4): x_i ~ softmax(l_i / T), c_i = softmax(l_i)[x_i].
"""

import torch
from torch import Tensor

from .laws import take_rows
from .numbers import compute_dtype
from .row_sampling import read_sampling, sample_rows


def sample_and_score(
    logits: Tensor,
    row_index: Tensor | None,
    probs: bool,
    temperature: float,
    temperature_tensor: Tensor | None,
    top_k: int,
    top_k_tensor: Tensor | None,
    top_p: float,
    top_p_tensor: Tensor | None,
    min_p: float,
    min_p_tensor: Tensor | None,
    filter_order: str,
    confidence: str,
    tempered: bool,
    exclude_ids: list[int],
    exclude_ids_tensor: Tensor | None,
    bias_ids: Tensor | None,
    bias: Tensor | None,
    allowed: Tensor | None,
    sampler: str,
    seed: int,
    seed_tensor: Tensor | None,
    offset: int,
    offset_tensor: Tensor | None,
    positions: Tensor | None,
    uniforms: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [..., V] or [rows, V] with row_index [...] -> tokens, confidence, lse [...]."""
    if row_index is None:
        rows, x, inside = logits.shape[:-1], as_requests(logits), None
    else:
        rows = row_index.shape
        x, _, inside = take_rows(logits, as_requests(row_index[..., None])[..., 0])
    if probs:
        x = x.to(compute_dtype(x.dtype)).log()
    B, R = x.shape[:2]
    sampling = read_sampling(
        *(temperature, temperature_tensor, top_k, top_k_tensor),
        *(top_p, top_p_tensor, min_p, min_p_tensor),
        filter_order,
        confidence,
        tempered,
        exclude_ids,
        exclude_ids_tensor,
        sampler,
        *(seed, seed_tensor, offset, offset_tensor),
        batch=B,
        like=x,
    )
    if positions is None:
        position = torch.arange(R, device=x.device).expand(B, R)
    else:
        position = positions.reshape(B, R)
    scored = sample_rows(
        x,
        position,
        None if bias_ids is None else bias_ids.reshape(B, R, bias_ids.shape[-1]),
        None if bias is None else bias.reshape(B, R, bias.shape[-1]),
        None if allowed is None else allowed.reshape(B, R, allowed.shape[-1]),
        None if uniforms is None else uniforms.reshape(B, R),
        sampling,
    )
    tokens, confidences, lse = scored.tokens, scored.confidence, scored.lse
    if inside is not None:
        tokens = torch.where(inside, tokens, -1)
        confidences = torch.where(inside, confidences, -torch.inf)
        lse = torch.where(inside, lse, -torch.inf)
    return tokens.reshape(rows), confidences.reshape(rows), lse.reshape(rows)


def as_requests(x: Tensor) -> Tensor:
    """[..., V] as [B, R, V]: [V] and [B, V] have one row a request."""
    if x.dim() == 1:
        return x[None, None]
    return x[:, None] if x.dim() == 2 else x.flatten(0, -3)
