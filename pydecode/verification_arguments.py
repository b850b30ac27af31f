"""Host-side checks and conversions that the verification ops share.

Chains: B requests with G drafted tokens read R = G + 1 target rows and G rows of the draft law.
Trees: T nodes read R = T target rows and T rows of the draft law.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reference.numbers import compute_dtype
from .validation import (
    FLOATS,
    INTS,
    data_at_most,
    data_range,
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


class Sizes(NamedTuple):
    """Sizes of one call."""

    B: int
    drafts: int  # G, or T - 1: the most drafted tokens a request can have
    rows: int  # G + 1, or T: target rows a request
    draft_rows: int  # G, or T: rows of the draft law a request
    r: str  # how errors spell ``rows``
    d: str  # how errors spell ``draft_rows``


def chain_sizes(draft_tokens: Any) -> Sizes:
    """draft_tokens [B, G]."""
    B, G = _tokens_shape(draft_tokens, "[B, G]")
    return Sizes(B, G, G + 1, G, "G+1", "G")


def tree_sizes(draft_tokens: Any, parents: Any) -> Sizes:
    """draft_tokens [B, T] with parents [B|1, T]."""
    B, T = _tokens_shape(draft_tokens, "[B, T]")
    if T == 0:
        raise ValueError("draft_tokens: expected at least the root in [B, T], got T = 0")
    expect_dim("parents", expect_tensor("parents", parents), 2, "[B|1, T]")
    shared = 1 if parents.shape[0] == 1 else B
    expect_index("parents", parents, (shared, T), "[B|1, T]", draft_tokens.device)
    return Sizes(B, T - 1, T, T, "T", "T")


def _tokens_shape(draft_tokens: Any, symbols: str) -> torch.Size:
    expect_tensor("draft_tokens", draft_tokens)
    expect_dim("draft_tokens", draft_tokens, 2, symbols)
    expect_dtype("draft_tokens", draft_tokens, INTS)
    return draft_tokens.shape


def max_depth_of(max_depth: int | None, T: int) -> int:
    """A Python int, since it is the output's width less one. None: T - 1."""
    if max_depth is None:
        return T - 1
    if isinstance(max_depth, bool) or not isinstance(max_depth, int):
        raise TypeError(f"max_depth: expected an int or None, got {type(max_depth).__name__}")
    if max_depth < 0:
        raise ValueError(f"max_depth: expected at least 0, got {max_depth}")
    return max_depth


# ---- the target ---------------------------------------------------------------------------------


def expect_target(
    target_logits: Any, target_probs: Any, row_index: Any, sizes: Sizes, device: torch.device
) -> tuple[Tensor | None, Tensor | None, int]:
    """Logits or probabilities, exactly one of them, and their vocabulary V."""
    if (target_logits is None) == (target_probs is None):
        got = "neither" if target_logits is None else "both"
        raise ValueError(f"target_logits, target_probs: expected exactly one of them, got {got}")
    name = "target_logits" if target_logits is not None else "target_probs"
    given = target_logits if target_logits is not None else target_probs
    x = expect_law(name, given, row_index, "row_index", (sizes.B, sizes.rows), sizes.r, device)
    return (x, None, x.shape[-1]) if target_logits is not None else (None, x, x.shape[-1])


def expect_law(
    name: str,
    x: Any,
    index: Any,
    index_name: str,
    shape: tuple[int, int],
    r: str,
    device: torch.device,
) -> Tensor:
    """Rows of floats: [B, R, V] for ``shape`` = (B, R), or any [rows, V] that ``index`` picks."""
    x = expect_tensor(name, x)
    expect_dtype(name, x, FLOATS)
    if index is None:
        expect_dim(name, x, 3, f"[B, {r}, V]")
        expect_shape(name, x, (*shape, x.shape[-1]), f"[B, {r}, V]")
    else:
        expect_index(index_name, index, shape, f"[B, {r}]", device)
        expect_dim(name, x, 2, f"[rows, V] (as {index_name} is given)")
    expect_device(name, x, device)
    expect_last_contiguous(name, x)
    if x.shape[-1] == 0:
        raise ValueError(f"{name}: expected a vocabulary of at least one entry, got V = 0")
    return x


def expect_allowed(allowed: Any, sizes: Sizes, V: int, device: torch.device) -> Tensor | None:
    """A grammar's mask, int32 bits [B, R, ceil(V/32)]; bit v % 32 of word v // 32 allows v."""
    if allowed is None:
        return None
    allowed = expect_tensor("allowed", allowed)
    expect_dtype("allowed", allowed, (torch.int32,))
    shape = (sizes.B, sizes.rows, (V + 31) // 32)
    expect_shape("allowed", allowed, shape, f"[B, {sizes.r}, ceil(V/32)]")
    expect_device("allowed", allowed, device)
    return allowed


# ---- the draft law ------------------------------------------------------------------------------


def expect_draft(
    draft_logits: Any,
    draft_probs: Any,
    draft_row_index: Any,
    draft_vocab: Any,
    sizes: Sizes,
    V: int,
    device: torch.device,
) -> tuple[Tensor | None, Tensor | None]:
    """Logits or probabilities that the drafts were drawn from; neither: deterministic drafts."""
    if draft_logits is not None and draft_probs is not None:
        raise ValueError("draft_logits, draft_probs: expected at most one of them, got both")
    if draft_logits is None and draft_probs is None:
        for name, given in (("draft_row_index", draft_row_index), ("draft_vocab", draft_vocab)):
            if given is not None:
                raise ValueError(f"{name}: expected None without draft_logits or draft_probs")
        return None, None
    name = "draft_logits" if draft_logits is not None else "draft_probs"
    given = draft_logits if draft_logits is not None else draft_probs
    shape = (sizes.B, sizes.draft_rows)
    x = expect_law(name, given, draft_row_index, "draft_row_index", shape, sizes.d, device)
    if draft_vocab is not None:
        expect_dim("draft_vocab", expect_tensor("draft_vocab", draft_vocab), 1, "[Vd]")
        expect_index("draft_vocab", draft_vocab, (x.shape[-1],), "[Vd]", device)
    elif x.shape[-1] != V:
        raise ValueError(
            f"{name}: expected the target's vocabulary V = {V} (or draft_vocab), "
            f"got {x.shape[-1]} entries"
        )
    return (x, None) if draft_logits is not None else (None, x)


# ---- numbers ------------------------------------------------------------------------------------

Pair = tuple[Any, Tensor | None]


def num_drafts_of(num_drafts: Any, sizes: Sizes, device: torch.device) -> Pair:
    """Drafted tokens (chain) or nodes after the root (tree) of each request. None: all."""
    value = sizes.drafts if num_drafts is None else num_drafts
    return number("num_drafts", value, sizes.B, device, kind=int, minimum=0)


def filters(
    temperature: Any, top_k: Any, top_p: Any, min_p: Any, B: int, device: torch.device
) -> tuple[Any, ...]:
    """The four pairs of the schema's filters; None is off."""
    return (
        *number("temperature", temperature, B, device, minimum=0),
        *number("top_k", 0 if top_k is None else top_k, B, device, kind=int),
        *number("top_p", 1.0 if top_p is None else top_p, B, device),
        *number("min_p", 0.0 if min_p is None else min_p, B, device),
    )


def draft_temperature_of(
    draft_temperature: Any, temperature: Any, B: int, device: torch.device
) -> Pair:
    """The draft's own temperature. None: the target's."""
    value = temperature if draft_temperature is None else draft_temperature
    return number("draft_temperature", value, B, device, minimum=0)


def random(
    seed: Any, offset: Any, positions: Any, uniforms: Any, sizes: Sizes, device: torch.device
) -> tuple[Any, ...]:
    """Seed, offset, positions (None: 0) and fixed uniforms [B, R|T + 1], as the schema has them."""
    pairs = []
    for name, value in (("seed", seed), ("offset", offset)):
        scalar, tensor = number(name, value, sizes.B, device, kind=int)
        pairs += [signed64(scalar), tensor]
    at = number("positions", 0 if positions is None else positions, sizes.B, device, kind=int)
    if uniforms is not None:
        uniforms = expect_tensor("uniforms", uniforms)
        expect_dtype("uniforms", uniforms, (torch.float32, torch.float64))
        # one draw a draft or node, and in the last column the correction's
        expect_shape("uniforms", uniforms, (sizes.B, sizes.draft_rows + 1), f"[B, {sizes.d}+1]")
        expect_device("uniforms", uniforms, device)
    return (*pairs, *at, uniforms)


# ---- device data, results -----------------------------------------------------------------------


def check_data(
    draft_tokens: Tensor,
    num_drafts: Pair,
    V: int,
    target: Tensor,
    row_index: Tensor | None,
    draft: Tensor | None = None,
    draft_row_index: Tensor | None = None,
    draft_vocab: Tensor | None = None,
    *,
    first: int,
) -> None:
    """Synchronising; ``first`` is the column of the first drafted token (a tree's root is none)."""
    B, width = draft_tokens.shape
    count, count_tensor = num_drafts
    if count_tensor is not None:
        data_range("num_drafts", count_tensor, 0, width - first + 1)
        count = count_tensor.long().expand(B)[:, None]
    i = torch.arange(width, device=draft_tokens.device).expand(B, width)
    data_range("draft_tokens", draft_tokens, 0, V, (i >= first) & (i < first + count))
    if row_index is not None:
        data_range("row_index", row_index, -1, target.shape[0])
    if draft_row_index is not None and draft is not None:
        data_range("draft_row_index", draft_row_index, -1, draft.shape[0])
    if draft_vocab is not None:
        data_range("draft_vocab", draft_vocab, 0, V)


def check_parents(parents: Tensor, num_drafts: Pair) -> None:
    """Synchronising: parents[b, 0] is -1, and every other node comes after its parent."""
    i = torch.arange(parents.shape[1], device=parents.device)
    last = num_drafts[0] if num_drafts[1] is None else num_drafts[1].reshape(-1, 1)
    counted = i <= last
    parents = torch.where(counted, parents, -1)  # nodes past the last are nobody's
    data_range("parents", parents, 0, parents.shape[1], ((i >= 1) & counted).expand_as(parents))
    data_at_most("parents", parents, i - 1, "expected each parent before its node, the root's -1")


def fake_verified(
    draft_tokens: Tensor, width: int, target: Tensor, return_logprobs: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tokens, num_accepted, path and logprobs of an op that returns ``width`` columns."""
    B = draft_tokens.shape[0]
    return (
        draft_tokens.new_empty((B, width), dtype=torch.int64),
        draft_tokens.new_empty((B,), dtype=torch.int32),
        draft_tokens.new_empty((B, width), dtype=torch.int32),
        target.new_empty(
            (B, width) if return_logprobs else (0,), dtype=compute_dtype(target.dtype)
        ),
    )
