"""Host-side checks and conversions that the row ops share: ``sample_and_score``, ``unmask``,
``commit``, ``remask``, ``soft_embed`` and ``coupled_accept``.
"""

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .validation import (
    FLOATS,
    INTS,
    data_range,
    expect_choice,
    expect_device,
    expect_dim,
    expect_dtype,
    expect_index,
    expect_last_contiguous,
    expect_shape,
    expect_tensor,
    number,
    signed64,
)
from .verification_arguments import filters

CONFIDENCES = ("probability", "margin", "neg_entropy", "random")
SAMPLERS = ("inverse_cdf", "gumbel")
FILTER_ORDERS = ("top_k_first", "joint")
RULES = (
    "top_k",
    "threshold",
    "factor",
    "entropy",
    "entropy_bound",
    "prefix",
    "sequential",
    "segments",
    "posterior",
    "external",
)


def expect_logits(name: str, x: Any) -> Tensor:
    """Float logits whose last dimension is a vocabulary of at least one entry."""
    x = expect_tensor(name, x)
    expect_dtype(name, x, FLOATS)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name}: expected [..., V] with V >= 1, got shape {list(x.shape)}")
    expect_last_contiguous(name, x)
    return x


def batch_of(rows: Sequence[int]) -> int:
    """B of rows [...]: [B] is B requests of one row, in [..., L] all but L belongs to B."""
    if len(rows) < 2:
        return rows[0] if len(rows) else 1
    batch = 1
    for size in rows[:-1]:
        batch *= size
    return batch


def expect_tokens(name: str, x: Any) -> Tensor:
    """int64 [B, L]."""
    x = expect_tensor(name, x)
    expect_dim(name, x, 2, "[B, L]")
    expect_dtype(name, x, (torch.int64,))
    return x


def expect_scores(name: str, x: Any, tokens: Tensor) -> Tensor:
    """Floats of tokens' shape."""
    x = expect_tensor(name, x)
    expect_dtype(name, x, FLOATS)
    expect_shape(name, x, tokens.shape, "[B, L]")
    expect_device(name, x, tokens.device)
    return x


def token_id(name: str, value: Any, vocab: int | None = None) -> int:
    """A token id as a Python int; below ``vocab`` if that is given."""
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    value = int(value)
    if vocab is not None and not 0 <= value < vocab:
        raise ValueError(f"{name}: expected a token id in [0, {vocab}), got {value}")
    return value


# ---- how rows are sampled and scored -------------------------------------------------------------


def seeds(seed: Any, offset: Any, B: int, device: torch.device) -> tuple[Any, ...]:
    """Seed and offset as the schema's pairs."""
    pairs: list[Any] = []
    for name, value in (("seed", seed), ("offset", offset)):
        scalar, tensor = number(name, value, B, device, kind=int)
        pairs += [signed64(scalar), tensor]
    return tuple(pairs)


def row_positions(
    positions: Any, shape: Sequence[int], symbols: str, device: torch.device
) -> Tensor | None:
    if positions is None:
        return None
    return expect_index("positions", positions, shape, symbols, device)


def row_uniforms(
    uniforms: Any, shape: Sequence[int], symbols: str, device: torch.device
) -> Tensor | None:
    """One fixed draw a row."""
    if uniforms is None:
        return None
    uniforms = expect_tensor("uniforms", uniforms)
    expect_dtype("uniforms", uniforms, (torch.float32, torch.float64))
    expect_shape("uniforms", uniforms, shape, symbols)
    expect_device("uniforms", uniforms, device)
    return uniforms


def exclude(
    ids: Any, B: int, vocab: int, device: torch.device, *, check: bool
) -> tuple[list[int], Tensor | None]:
    """``exclude_ids``: an int, a sequence of ints, or an int tensor [n] or [B, n]."""
    if ids is None:
        return [], None
    if isinstance(ids, Tensor):
        expect_dtype("exclude_ids", ids, INTS)
        expect_device("exclude_ids", ids, device)
        ids = ids[None] if ids.dim() == 0 else ids
        if ids.dim() > 2 or (ids.dim() == 2 and ids.shape[0] != B):
            raise ValueError(
                f"exclude_ids: expected shape [n] or [B, n] = [{B}, n], got {list(ids.shape)}"
            )
        if check:
            data_range("exclude_ids", ids, 0, vocab, ids != -1)
        return [], ids
    listed = list(ids) if isinstance(ids, Sequence) and not isinstance(ids, str) else [ids]
    return [token_id("exclude_ids", v, vocab) for v in listed], None


def bias_pair(
    ids: Any,
    bias: Any,
    rows: Sequence[int],
    symbols: str,
    vocab: int,
    device: torch.device,
    *,
    check: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """A sparse logit bias, int ids and floats [*rows, n]."""
    if ids is None and bias is None:
        return None, None
    if ids is None or bias is None:
        raise ValueError("bias_ids, bias: expected both or neither, got one of them")
    ids, bias = expect_tensor("bias_ids", ids), expect_tensor("bias", bias)
    expect_dtype("bias_ids", ids, INTS)
    expect_dtype("bias", bias, FLOATS)
    n = ids.shape[-1] if ids.dim() else 0
    for name, x in (("bias_ids", ids), ("bias", bias)):
        expect_shape(name, x, (*rows, n), f"[{symbols}, n]")
        expect_device(name, x, device)
    if check:
        data_range("bias_ids", ids, 0, vocab, ids != -1)
    return ids, bias


def allowed_words(
    allowed: Any, rows: Sequence[int], symbols: str, vocab: int, device: torch.device
) -> Tensor | None:
    """A grammar's mask, int32 bits [*rows, ceil(V/32)]."""
    if allowed is None:
        return None
    allowed = expect_tensor("allowed", allowed)
    expect_dtype("allowed", allowed, (torch.int32,))
    expect_shape("allowed", allowed, (*rows, (vocab + 31) // 32), f"[{symbols}, ceil(V/32)]")
    expect_device("allowed", allowed, device)
    return allowed


def row_sampling(
    rows: Sequence[int],
    symbols: str,
    B: int,
    vocab: int,
    device: torch.device,
    *,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    filter_order: Any,
    confidence: Any,
    tempered: Any,
    exclude_ids: Any,
    bias_ids: Any,
    bias: Any,
    bias_rows: Sequence[int],
    bias_symbols: str,
    allowed: Any,
    sampler: Any,
    seed: Any,
    offset: Any,
    positions: Any,
    uniforms: Any,
    check: bool,
) -> tuple[Any, ...]:
    """The schema's arguments from ``temperature`` to ``uniforms``.

    rows: the shape of what is returned; bias_rows: of the rows of logits.
    """
    expect_choice("filter_order", filter_order, FILTER_ORDERS)
    expect_choice("confidence", confidence, CONFIDENCES)
    expect_choice("sampler", sampler, SAMPLERS)
    if uniforms is not None and sampler == "gumbel":
        raise ValueError(
            'uniforms: expected None with sampler="gumbel", which draws one number a token'
        )
    shape = f"[{symbols}]"
    return (
        *filters(temperature, top_k, top_p, min_p, B, device),
        *(filter_order, confidence, bool(tempered)),
        *exclude(exclude_ids, B, vocab, device, check=check),
        *bias_pair(bias_ids, bias, bias_rows, bias_symbols, vocab, device, check=check),
        allowed_words(allowed, rows, symbols, vocab, device),
        sampler,
        *seeds(seed, offset, B, device),
        row_positions(positions, rows, shape, device),
        row_uniforms(uniforms, rows, shape, device),
    )


# ---- which rows are committed --------------------------------------------------------------------


def rule_arguments(
    rule: Any,
    B: int,
    device: torch.device,
    *,
    k: Any,
    threshold: Any,
    slack: Any,
    factor: Any,
    low: Any,
    keep: Any,
    strict: Any,
    min_commit: Any,
    max_commit: Any,
) -> tuple[Any, ...]:
    """The schema's arguments from ``rule`` to ``max_commit``."""
    expect_choice("rule", rule, RULES)
    least = (0 if rule == "posterior" else 1) if min_commit is None else min_commit
    most = -1 if max_commit is None else max_commit
    for name, value in (("min_commit", least), ("max_commit", most)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int or None, got {type(value).__name__}")
    if least < 0:
        raise ValueError(f"min_commit: expected at least 0, got {least}")
    if max_commit is not None and most < least:
        raise ValueError(f"max_commit: expected at least min_commit = {least}, got {most}")
    return (
        rule,
        *number("k", k, B, device, kind=int, minimum=0),
        *number("threshold", threshold, B, device),
        *number("slack", slack, B, device, minimum=0),
        *number("factor", factor, B, device),
        *number("low", low, B, device),
        *number("keep", keep, B, device),
        *(bool(strict), least, most),
    )


def window_of(window: Any, B: int, device: torch.device) -> tuple[int, Tensor | None, int]:
    """``window=(start, length)`` as the schema has it; None: start 0, length -1."""
    if window is None:
        return 0, None, -1
    if not isinstance(window, Sequence) or isinstance(window, str) or len(window) != 2:
        raise TypeError(f"window: expected None or a pair (start, length), got {window!r}")
    start, length = window
    if isinstance(length, bool) or not isinstance(length, int):
        raise TypeError(f"window: expected an int as its length, got {type(length).__name__}")
    if length < 0:
        raise ValueError(f"window: expected a length of at least 0, got {length}")
    return (*number("window", start, B, device, kind=int), length)


def masked_rows(masked: Any, tokens: Tensor) -> Tensor | None:
    if masked is None:
        return None
    masked = expect_tensor("masked", masked)
    expect_dtype("masked", masked, (torch.bool,))
    expect_shape("masked", masked, tokens.shape, "[B, L]")
    expect_device("masked", masked, tokens.device)
    return masked


def external_scores(external_score: Any, rule: str, tokens: Tensor) -> Tensor | None:
    if external_score is None:
        if rule == "external":
            raise ValueError(
                'external_score: expected scores [B, L] with rule="external", got None'
            )
        return None
    return expect_scores("external_score", external_score, tokens)
