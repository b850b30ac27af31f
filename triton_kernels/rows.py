"""Rows of logits for the diffusion ops: which are read, from where, and what changes them.

Results are numbered r = b R + j. ``sample_and_score`` takes result r from row j of request b, or
from any row by an index. In ``unmask`` j counts the window's positions, and only those that are
masked are read; the row of logits follows from the position, the window's start and the shift.

Triton specialises ints inside tuples whatever ``do_not_specialize`` says: on 1, and on multiples of
16. What changes between calls is therefore handed over as 4 v + 2 (``plain``), which is neither,
and read as ``x >> 2``.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .vocabulary import as_scalar, number, plain


class Rows(NamedTuple):
    """The logits: what a model fixes, so it may be part of the binary."""

    x: Any  # rows of V, last stride 1
    stride_b: Any
    stride_r: Any
    V: Any
    C: Any  # chunks a row


class Place(NamedTuple):
    """Which row each result reads; ``tokens`` is None in ``sample_and_score``. Not specialised."""

    R: Any  # results a request
    num_rows: Any  # of the logits: with an index all of them, else those of a request
    index: Any  # [B, R], or None
    stride_index_b: Any
    stride_index_r: Any
    tokens: Any  # [B, L]
    stride_tokens_b: Any
    stride_tokens_l: Any
    masked: Any  # bytes [B, L], or None
    stride_masked_b: Any
    stride_masked_l: Any
    mask_id: Any
    L: Any
    start: Any  # the window's: a pair of the schema
    start_of: Any
    stride_start: Any
    length: Any
    shift: Any
    relative: Any  # 1: rows of logits begin at the window's start


class Changes(NamedTuple):
    """What is added to rows and taken out of them; the schema's tensors and their strides."""

    bias_ids: Any  # [B, rows, n]
    stride_ids_b: Any
    stride_ids_r: Any
    bias: Any
    stride_bias_b: Any
    stride_bias_r: Any
    num_bias: Any
    exclude: Any  # a tuple of ids
    exclude_ids: Any  # [1|B, n]
    stride_exclude_b: Any
    num_excluded: Any
    allowed: Any  # [B, L, words]
    stride_allowed_b: Any
    stride_allowed_l: Any
    log: Any  # not None: probabilities


class Keys(NamedTuple):
    """Of draws: seed and offset as words of 24, 24 and 16 bits, so that their size never changes
    the binary; positions and uniforms [B, L], or None."""

    seed: Any
    seed_of: Any
    stride_seed: Any
    offset: Any
    offset_of: Any
    stride_offset: Any
    positions: Any
    stride_positions_b: Any
    stride_positions_l: Any
    uniforms: Any
    stride_uniforms_b: Any
    stride_uniforms_l: Any


@triton.jit
def window_start(place, b):
    return as_scalar(number(place.start >> 2, place.start_of, place.stride_start, b), tl.int64)


@triton.jit
def locate(rows, place, r):
    """(request b, index i in [B, L] tensors, whether that is inside, line of logits, whether it is
    read) of result r; all int64."""
    b, j = (r // (place.R >> 2)).to(tl.int64), (r % (place.R >> 2)).to(tl.int64)
    if place.tokens is None:
        i = j
        inside = r >= 0
        if place.index is None:
            line = j
            read = r >= 0
        else:
            index = place.index + b * (place.stride_index_b >> 2) + j * (place.stride_index_r >> 2)
            line = tl.load(index).to(tl.int64)
            read = (line >= 0) & (line < (place.num_rows >> 2))
            line = tl.where(read, line, 0)
    else:
        start = window_start(place, b)
        i = tl.where((place.R >> 2) < (place.L >> 2), start + j, j)
        inside = (i >= 0) & (i < (place.L >> 2)) & (i >= start) & (i < start + (place.length >> 2))
        i = tl.where(inside, i, 0)
        if place.masked is None:
            token = tl.load(
                place.tokens + b * (place.stride_tokens_b >> 2) + i * (place.stride_tokens_l >> 2)
            )
            read = inside & (token == place.mask_id)
        else:
            bit = tl.load(
                place.masked + b * (place.stride_masked_b >> 2) + i * (place.stride_masked_l >> 2)
            )
            read = inside & (bit != 0)
        line = i - place.shift - place.relative * start
        line = tl.maximum(tl.minimum(line, (place.num_rows >> 2) - 1), 0)
    return b, i, inside, line, read


@triton.jit
def row_at(rows, place, b, line):
    """Pointer to a row of logits."""
    row = rows.x + line * rows.stride_r
    if place.index is None:
        row += b * rows.stride_b
    return row


@triton.jit
def edits_at(changes, place, b, i, line):
    """Where the entries of ``changes`` begin: allowed, bias_ids, bias, exclude_ids. A bias belongs
    to the row of logits (with an index, to the result), ``allowed`` to i."""
    allowed = b * (changes.stride_allowed_b >> 2) + i * (changes.stride_allowed_l >> 2)
    if place.index is not None:
        line = i
    ids = b * (changes.stride_ids_b >> 2) + line * (changes.stride_ids_r >> 2)
    bias = b * (changes.stride_bias_b >> 2) + line * (changes.stride_bias_r >> 2)
    return allowed, ids, bias, b * changes.stride_exclude_b


@triton.jit
def entry(row, edits, token):
    """One allowed entry of a row as the law sees it."""
    x = tl.load(row + token).to(tl.float32)
    if edits.log is not None:
        x = tl.log(x)
    if edits.bias_ids is not None:
        total = tl.zeros([], tl.float32)
        for n in range(edits.num_bias):
            more = tl.load(edits.bias + edits.bias_at + n).to(tl.float32)
            total += tl.where(tl.load(edits.bias_ids + edits.ids_at + n) == token, more, 0.0)
        x += total
    return x


@triton.jit
def joined(words):
    """A 64-bit number of its words."""
    low = tl.zeros([], tl.int64) + (words[0] >> 2)
    middle = tl.zeros([], tl.int64) + (words[1] >> 2)
    high = tl.zeros([], tl.int64) + (words[2] >> 2)
    return low | (middle << 24) | (high << 48)


@triton.jit
def seed_of(keys, b, PER_REQUEST: tl.constexpr):
    """Request b's 64-bit seed: a [B] seed as it is, a scalar one with b added to its high word."""
    if keys.seed_of is None:
        seed = joined(keys.seed)
    else:
        seed = tl.load(keys.seed_of + b * keys.stride_seed).to(tl.int64)
    if not PER_REQUEST:
        seed += b << 32
    return seed


@triton.jit
def offset_of(keys, b):
    if keys.offset_of is None:
        offset = joined(keys.offset)
    else:
        offset = tl.load(keys.offset_of + b * keys.stride_offset).to(tl.int64)
    return offset


@triton.jit
def position_of(keys, b, i):
    """Of one index i, or of a vector of them inside the row."""
    position = i
    if keys.positions is not None:
        at = (
            keys.positions + b * (keys.stride_positions_b >> 2) + i * (keys.stride_positions_l >> 2)
        )
        position = tl.load(at).to(tl.int64)
    return position


# ---- on the host ---------------------------------------------------------------------------------


def words_of(value: int) -> tuple[int, int, int]:
    """A signed 64-bit number as words that are small ints: low, middle, and the sign's."""
    return plain(value & 0xFFFFFF), plain(value >> 24 & 0xFFFFFF), plain(value >> 48)


def stride0(tensor: Tensor | None) -> int:
    """Along requests, of a 0-d or [B] tensor."""
    return 0 if tensor is None or tensor.dim() == 0 else tensor.stride(0)


def as_rows(x: Tensor) -> Tensor:
    """[..., V] as [B, R, V]: [V] and [B, V] have one row a request."""
    dim = x.dim()
    if dim == 3:
        return x
    if dim == 1:
        return x[None, None]
    return x[:, None] if dim == 2 else x.flatten(0, -3)


def two(x: Tensor | None) -> tuple[Any, int, int]:
    """A tensor [..., L] with the strides of b and l: [B] is B requests of one row."""
    if x is None:
        return None, 0, 0
    if x.dim() < 2:
        return x, plain(x.stride(0) if x.dim() else 0), plain(0)
    if x.dim() > 2:
        x = x.flatten(0, -2)
    return x, plain(x.stride(0)), plain(x.stride(1))


def three(x: Tensor | None) -> tuple[Any, int, int]:
    """A tensor [..., L, n] with the strides of b and l, its last stride 1."""
    if x is None:
        return None, 0, 0
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    x = as_rows(x)
    return x, plain(x.stride(0)), plain(x.stride(1))


def changes_of(
    exclude: list[int],
    exclude_ids: Tensor | None,
    bias_ids: Tensor | None,
    bias: Tensor | None,
    allowed: Tensor | None,
    log: bool,
    V: int,
    device: torch.device,
) -> Changes:
    """``exclude``: ids outside the vocabulary exclude nothing."""
    ids = [v for v in dict.fromkeys(exclude) if 0 <= v < V]
    if len(ids) > 16:  # each is an instruction a chunk; a copy from a list would synchronise
        listed = torch.stack([torch.full((), v, device=device) for v in ids])
        if exclude_ids is not None:
            both = listed.expand(*exclude_ids.shape[:-1], len(ids)), exclude_ids
            listed = torch.cat(both, -1)
        ids, exclude_ids = [], listed
    if exclude_ids is not None and exclude_ids.shape[-1] and exclude_ids.stride(-1) != 1:
        exclude_ids = exclude_ids.contiguous()
    return Changes(
        *three(bias_ids),
        *three(bias),
        plain(0 if bias_ids is None else bias_ids.shape[-1]),
        tuple(ids),
        exclude_ids,
        0 if exclude_ids is None or exclude_ids.dim() == 1 else exclude_ids.stride(0),
        0 if exclude_ids is None else exclude_ids.shape[-1],
        *three(allowed),
        1 if log else None,
    )


def keys_of(
    seed: int,
    seed_tensor: Tensor | None,
    offset: int,
    offset_tensor: Tensor | None,
    positions: Tensor | None,
    uniforms: Tensor | None,
) -> Keys:
    return Keys(
        words_of(seed),
        seed_tensor,
        stride0(seed_tensor),
        words_of(offset),
        offset_tensor,
        stride0(offset_tensor),
        *two(positions),
        *two(uniforms),
    )


def per_request(seed_tensor: Tensor | None) -> bool:
    return seed_tensor is not None and seed_tensor.dim() == 1
