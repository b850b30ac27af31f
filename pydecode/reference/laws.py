"""From logits to laws: temperature, filters, grammar masks, and one draw by inverse CDF.

The order of DESIGN section 3: temperature, top-k, renormalise, top-p, renormalise, min-p,
renormalise. Supports are value thresholds, so ties share their fate.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .numbers import compute_dtype, per_request


class Filters(NamedTuple):
    """Temperature and filters, one value a request [B]; None is off for the whole batch."""

    temperature: Tensor
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None


class Rows(NamedTuple):
    """Rows of a law."""

    p: Tensor  # [B, R, V], each row sums to 1 (a row that is not good: zeros)
    good: Tensor  # bool [B, R]: no NaN and something is allowed
    present: Tensor  # bool [B, R]: the row exists (row_index was not -1)


def filters(
    temperature: float,
    temperature_tensor: Tensor | None,
    top_k: int,
    top_k_tensor: Tensor | None,
    top_p: float,
    top_p_tensor: Tensor | None,
    min_p: float,
    min_p_tensor: Tensor | None,
    *,
    batch: int,
    like: Tensor,
) -> Filters:
    """The schema's pairs; a filter that is off by its Python number costs nothing."""
    dtype = compute_dtype(like.dtype)
    return Filters(
        per_request(temperature, temperature_tensor, batch, like, dtype),
        None
        if top_k_tensor is None and top_k <= 0
        else per_request(top_k, top_k_tensor, batch, like, torch.int64),
        None
        if top_p_tensor is None and top_p >= 1
        else per_request(top_p, top_p_tensor, batch, like, dtype),
        None
        if min_p_tensor is None and min_p <= 0
        else per_request(min_p, min_p_tensor, batch, like, dtype),
    )


def take_rows(x: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [B, R, V] of [B, R, V], or of [rows, V] by index [B, R].

    Also ``present`` (the index is not -1) and ``inside`` (it is a row of x); others are NaN-free
    stand-ins that nobody may read.
    """
    if index is None:
        yes = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return x, yes, yes
    flat = x.reshape(-1, x.shape[-1])
    index = index.long()
    present, inside = index != -1, (index >= 0) & (index < flat.shape[0])
    if flat.shape[0] == 0:
        return x.new_zeros(*index.shape, x.shape[-1]), present, inside
    return flat[torch.where(inside, index, 0)], present, inside


def allowed_bits(allowed: Tensor, vocab: int) -> Tensor:
    """int32 bits [..., ceil(V/32)] -> bool [..., V], little end first."""
    v = torch.arange(vocab, device=allowed.device)
    return (allowed[..., v // 32] >> (v % 32).int()) & 1 == 1


def usable_logits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in the compute dtype, and which rows are good: no NaN, some entry above -inf.

    Several +inf share the mass: they become 0 and all else -inf.
    """
    x = x.to(compute_dtype(x.dtype))
    infinite = x == torch.inf
    split = torch.where(infinite, 0.0, -torch.inf).to(x.dtype).masked_fill(x.isnan(), torch.nan)
    x = torch.where(infinite.any(-1, keepdim=True), split, x)
    good = ~x.isnan().any(-1) & (x > -torch.inf).any(-1)
    return x, good


def first_argmax(x: Tensor) -> Tensor:
    """Index of the largest entry of each row; ties go to the lowest index, as torch promises."""
    return x.max(-1).indices  # 3 times faster than argmax in 16 bits


def one_hot_argmax(x: Tensor) -> Tensor:
    """All the mass on the first argmax."""
    return torch.zeros_like(x).scatter_(-1, first_argmax(x)[..., None], 1.0)


def filtered_support(x: Tensor, f: Filters, order: str = "top_k_first") -> Tensor:
    """Which entries of tempered logits [B, R, V] survive the filters, bool.

    In the order "joint" top-p acts on the whole law, not on what top-k left of it.
    """
    vocab = x.shape[-1]
    whole = keep = x > -torch.inf
    if f.top_k is not None:
        k = f.top_k[:, None, None]
        ordered = x.sort(-1, descending=True).values
        kth = ordered.gather(-1, (k - 1).clamp(0, vocab - 1).expand(*x.shape[:2], 1))
        keep = keep & ((x >= kth) | (k <= 0) | (k >= vocab))
    if f.top_p is not None:
        p = x.masked_fill(~(whole if order == "joint" else keep), -torch.inf).softmax(-1)
        top_p = f.top_p[:, None, None]
        ordered = p.sort(-1, descending=True).values
        mass = ordered.cumsum(-1)
        above = torch.nn.functional.pad(mass[..., :-1], (1, 0))  # before each rank
        last = (above < top_p).sum(-1, keepdim=True) - 1  # ties with it stay as well
        edge = ordered.gather(-1, last.clamp(min=0))
        keep = keep & ((p >= edge) | ~(top_p < 1))
    if f.min_p is not None:
        p = x.masked_fill(~keep, -torch.inf).softmax(-1)
        min_p = f.min_p[:, None, None].clamp(max=1.0)  # above 1 nothing would be left
        keep = keep & ((p >= min_p * p.amax(-1, keepdim=True)) | ~(min_p > 0))
    return keep


def tempered_logits(x: Tensor, temperature: Tensor) -> Tensor:
    """x / T of rows [B, R, V], T [B]; T = 0 (greedy, no law) counts as 1.

    A row that a tiny T would overflow is taken less its maximum; -inf stays -inf at T = inf too.
    """
    t = torch.where(temperature > 0, temperature, 1.0).to(x.dtype)[:, None, None]
    scaled, nothing = x / t, x == -torch.inf
    overflows = (scaled.isinf() & ~nothing).any(-1, keepdim=True)
    scaled = torch.where(overflows, (x - x.amax(-1, keepdim=True)) / t, scaled)
    return scaled.masked_fill(nothing, -torch.inf)


def logits_law(x: Tensor, f: Filters, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Law p [B, R, V] of logits [B, R, V] and which rows are good [B, R].

    Temperature 0 puts all mass on the (first) argmax. A NaN or negative temperature: not good.
    """
    x = x.to(compute_dtype(x.dtype))
    if allowed is not None:
        x = x.masked_fill(~allowed_bits(allowed, x.shape[-1]), -torch.inf)
    x, good = usable_logits(x)
    x = torch.where(good[..., None], x, 0.0)
    greedy = (f.temperature == 0)[:, None, None]
    x_t = tempered_logits(x, f.temperature)
    keep = filtered_support(x_t, f)
    p = torch.where(greedy, one_hot_argmax(x), x_t.masked_fill(~keep, -torch.inf).softmax(-1))
    good = good & (f.temperature >= 0)[:, None]
    return torch.where(good[..., None], p, 0.0), good


def given_law(p: Tensor, f: Filters, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Probabilities as they were given, divided by their sum; temperature 0 takes their argmax."""
    p = p.to(compute_dtype(p.dtype))
    if allowed is not None:
        p = p.masked_fill(~allowed_bits(allowed, p.shape[-1]), 0.0)
    total = p.cumsum(-1)[..., -1:] if p.shape[-1] else p.sum(-1, keepdim=True)
    good = (p >= 0).all(-1) & (total[..., 0] > 0) & total[..., 0].isfinite()
    greedy = (f.temperature == 0)[:, None, None]
    p = torch.where(greedy, one_hot_argmax(p), p / total)  # dividing first could merge neighbours
    return torch.where(good[..., None], p, 0.0), good & (f.temperature >= 0)[:, None]


def law(
    logits: Tensor | None,
    probs: Tensor | None,
    index: Tensor | None,
    f: Filters,
    allowed: Tensor | None = None,
) -> Rows:
    """Rows of the law from logits or probabilities, whichever is given, taken by index."""
    x = logits if logits is not None else probs
    assert x is not None
    rows, present, inside = take_rows(x, index)
    p, good = (logits_law if logits is not None else given_law)(rows, f, allowed)
    return Rows(p, good & inside, present)


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """Inverse CDF: the smallest v with cumsum(w)[v] > u * sum(w); weights [..., V], u [...].

    Where rounding leaves no such v, the last v with w > 0.
    """
    c = weights.cumsum(-1)
    total = c[..., -1]
    index = (c <= (u * total)[..., None]).sum(-1)
    at = torch.arange(weights.shape[-1], device=weights.device)
    last = torch.where(weights > 0, at, 0).amax(-1)
    return torch.minimum(index, last)
