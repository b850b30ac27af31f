"""Rows of logits -> a token, a confidence and a log-sum-exp each: what the row ops share."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import philox
from .laws import (
    Filters,
    allowed_bits,
    draw,
    filtered_support,
    first_argmax,
    tempered_logits,
    usable_logits,
)
from .laws import filters as read_filters
from .numbers import compute_dtype, per_request


class RowSampling(NamedTuple):
    """How rows are sampled and scored."""

    filters: Filters
    filter_order: str
    greedy: bool  # temperature is the Python number 0: no law is needed to choose
    confidence: str
    tempered: bool
    excluded: Tensor | None  # bool [1|B, 1, V]
    sampler: str
    seed: Tensor  # [B] int64
    offset: Tensor  # [B] int64


class RowScores(NamedTuple):
    """Rows [B, R]; a row that is not good has token -1 and confidence -inf."""

    tokens: Tensor  # int64
    confidence: Tensor
    lse: Tensor
    good: Tensor  # bool


def read_sampling(
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
    sampler: str,
    seed: int,
    seed_tensor: Tensor | None,
    offset: int,
    offset_tensor: Tensor | None,
    *,
    batch: int,
    like: Tensor,
) -> RowSampling:
    """The schema's arguments, less the tensors with a row each; ``like``: the logits [..., V]."""
    return RowSampling(
        read_filters(
            *(temperature, temperature_tensor, top_k, top_k_tensor),
            *(top_p, top_p_tensor, min_p, min_p_tensor),
            batch=batch,
            like=like,
        ),
        filter_order,
        temperature_tensor is None and temperature == 0,
        confidence,
        tempered,
        excluded_ids(exclude_ids, exclude_ids_tensor, like.shape[-1], like.device),
        sampler,
        philox.request_keys(seed, seed_tensor, batch, like.device),
        per_request(offset, offset_tensor, batch, like, torch.int64),
    )


def excluded_ids(
    ids: list[int], tensor: Tensor | None, vocab: int, device: torch.device
) -> Tensor | None:
    """Which tokens count as -inf, bool [1|B, 1, V]; ids outside the vocabulary exclude nothing."""
    if not ids and tensor is None:
        return None
    v = torch.arange(vocab, device=device)
    excluded = torch.zeros(1, vocab, dtype=torch.bool, device=device)
    for token in ids:  # no tensor is made of the list: that copy would synchronise
        excluded = excluded | (v == token)
    if tensor is not None:
        listed = tensor.long()[None] if tensor.dim() == 1 else tensor.long()
        inside = (listed >= 0) & (listed < vocab)
        marks = torch.zeros(listed.shape[0], vocab + 1, dtype=torch.bool, device=device)
        marks = marks.scatter(-1, torch.where(inside, listed, vocab), True)
        excluded = excluded | marks[:, :vocab]
    return excluded[:, None]


def add_bias(logits: Tensor, ids: Tensor, bias: Tensor) -> Tensor:
    """Logits [B, R, V] plus bias at ids, both [B, R, n]; ids outside the vocabulary add nothing."""
    x = logits.to(compute_dtype(logits.dtype))
    if ids.shape[-1] == 0:
        return x
    inside = (ids >= 0) & (ids < x.shape[-1])
    ids = torch.where(inside, ids.long(), 0)
    bias = torch.where(inside, bias.to(x.dtype), 0.0)
    # all entries of one id hold its whole sum, so that it does not matter which is written last
    same = ids[..., :, None] == ids[..., None, :]
    total = torch.where(same, bias[..., None, :], 0.0).cumsum(-1)[..., -1]
    return x.scatter(-1, ids, x.gather(-1, ids) + total)


def sample_rows(
    logits: Tensor,
    position: Tensor,
    bias_ids: Tensor | None,
    bias: Tensor | None,
    allowed: Tensor | None,
    uniforms: Tensor | None,
    s: RowSampling,
) -> RowScores:
    """Logits [B, R, V], positions [B, R], bias [B, R, n], allowed [B, R, ceil(V/32)], uniforms."""
    V = logits.shape[-1]
    if bias_ids is not None and bias is not None:
        logits = add_bias(logits, bias_ids, bias)
    if s.excluded is not None:
        logits = logits.masked_fill(s.excluded, -torch.inf)
    if allowed is not None:
        logits = logits.masked_fill(~allowed_bits(allowed, V), -torch.inf)
    x, good = usable_logits(logits)
    x = torch.where(good[..., None], x, 0.0)
    temperature = s.filters.temperature
    good = good & (temperature >= 0)[:, None]

    # the law that is sampled from, in logits
    x_t = x
    if not s.greedy or s.tempered:
        x_t = tempered_logits(x, temperature)
        x_t = x_t.masked_fill(~filtered_support(x_t, s.filters, s.filter_order), -torch.inf)

    if s.greedy:
        tokens = first_argmax(x)
    elif s.sampler == "gumbel":
        tokens = perturbed_argmax(x_t, temperature, s.seed, s.offset, position)
    else:
        if uniforms is None:
            uniforms = row_uniform(philox.DRAFT, s.seed, s.offset, position)
        # a caller's NaN or u outside [0, 1] must not leave the support
        drawn = draw(x_t.softmax(-1), uniforms.nan_to_num(0.0).clamp(0, 1))
        tokens = torch.where((temperature == 0)[:, None], first_argmax(x), drawn)

    # the largest log p is max - lse: max is exact, and no sum of one long row is split over threads
    peak = logits.amax(-1).to(x.dtype)  # NaN, inf and -inf stay, and are the lse then
    lse = torch.where(peak.isfinite(), peak - x.log_softmax(-1).amax(-1), peak)
    scored = x_t if s.tempered else x
    if s.confidence == "probability":
        confidence = scored.softmax(-1).gather(-1, tokens[..., None])[..., 0]
    elif s.confidence == "margin":
        best = scored.softmax(-1).topk(min(2, V), -1).values
        confidence = best[..., 0] - best[..., 1] if V > 1 else best[..., 0]
    elif s.confidence == "neg_entropy":
        confidence = -entropy_of(scored.log_softmax(-1))
    else:
        confidence = row_uniform(philox.RANDOM_CONFIDENCE, s.seed, s.offset, position).to(x.dtype)
    return RowScores(
        torch.where(good, tokens, -1), torch.where(good, confidence, -torch.inf), lse, good
    )


def perturbed_argmax(
    x_t: Tensor, temperature: Tensor, seed: Tensor, offset: Tensor, position: Tensor
) -> Tensor:
    """argmax_v x_t + g of tempered logits [B, R, V]; no noise where temperature [B] is 0.

    ``coupled_accept`` regenerates this noise. The sum is fp64: fp32 would round near-ties together.
    """
    g = philox.gumbel(philox.DRAFT, seed[:, None], offset[:, None], position.long(), x_t.shape[-1])
    g = torch.where((temperature == 0)[:, None, None], 0.0, g)
    return first_argmax(x_t.double() + g)


def row_uniform(stream: int, seed: Tensor, offset: Tensor, position: Tensor) -> Tensor:
    """One uniform a row, [B, R]."""
    index = torch.zeros((), dtype=torch.int64, device=seed.device)
    return philox.uniform(stream, seed[:, None], offset[:, None], position.long(), index)


def entropy_of(log_p: Tensor) -> Tensor:
    """-sum p log p in nats, [...] of log p [..., V]."""
    p = log_p.exp()
    # cumsum: a plain sum of one long row may be split over threads, so depend on the batch
    terms = torch.where(p > 0, p * log_p, 0.0).cumsum(-1)
    return -terms[..., -1]
