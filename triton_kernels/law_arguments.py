"""A law's rows and numbers as kernels take them, made of the schema's arguments on the host."""

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .supports import scratch_of
from .vocabulary import plain

CHUNK = 4096
Pair = tuple[Any, Tensor | None]


class LawRows(NamedTuple):
    """A law's rows as kernels see them; made by ``law_rows``."""

    x: Any  # logits or probabilities, rows of V, last stride 1
    index: Any  # row of each (b, i), or None
    allowed: Any  # int32 bits [B, R, words], or None
    stats: Any  # fp32 [B R, 3, C]: of each chunk the top (NaN: a NaN, or a probability that is
    # none), the sum of e(v) against it or of the probabilities, and the argmax (int32)
    floors: Any  # fp32 [B R, 2]: what top-k and top-p leave lies at or above the first; the second
    # is the mass that all filters leave. None: no filter
    vocab: Any  # ids [V] in the target's vocabulary of a reduced one's columns, or None
    firsts: Any  # int32 [chunks of the target + 2], see ``index_vocab``
    num_rows: Any  # of x, where there is an index, as ``plain`` has it
    R: Any  # rows a request
    V: Any
    C: Any  # chunks a row
    target_C: Any  # chunks of the target's rows
    stride_b: Any
    stride_r: Any
    stride_index_b: Any
    stride_index_r: Any
    stride_allowed_b: Any
    stride_allowed_r: Any
    PROBS: Any
    search: Any = None  # ``supports.Scratch`` of the filters
    SEARCHED: Any = tl.constexpr(False)  # that a walk uses it


class Numbers(NamedTuple):
    """Temperature and filters of a law: pairs of the schema, and their strides along requests.

    A filter whose value is None is off for the whole batch.
    """

    temperature: Any
    temperature_of: Any
    stride_temperature: Any
    top_k: Any
    top_k_of: Any
    stride_top_k: Any
    top_p: Any
    top_p_of: Any
    stride_top_p: Any
    min_p: Any
    min_p_of: Any
    stride_min_p: Any


def pair(number: Any, tensor: Tensor | None) -> tuple[Any, Tensor | None, int]:
    """A number of the schema, its tensor, and that one's stride along requests."""
    return number, tensor, 0 if tensor is None or tensor.dim() == 0 else tensor.stride(0)


def numbers_of(temperature: Pair, top_k: Pair, top_p: Pair, min_p: Pair) -> Numbers:
    """The schema's pairs; a filter that is off by its Python number is not compiled in."""
    off = (None, None, 0)
    return Numbers(
        *pair(float(temperature[0]), temperature[1]),
        *(off if top_k[1] is None and top_k[0] <= 0 else pair(*top_k)),
        *(off if top_p[1] is None and top_p[0] >= 1 else pair(float(top_p[0]), top_p[1])),
        *(off if min_p[1] is None and min_p[0] <= 0 else pair(float(min_p[0]), min_p[1])),
    )


def is_filtered(numbers: Numbers) -> bool:
    return not numbers.top_k is numbers.top_p is numbers.min_p is None


def law_rows(
    logits: Tensor | None,
    probs: Tensor | None,
    index: Tensor | None,
    allowed: Tensor | None,
    batch: int,
    rows: int,
    filtered: bool,
    vocab: Tensor | None = None,
    target_vocab: int = 0,
) -> LawRows:
    """Scratch for a law of ``rows`` rows a request, [B, rows, V] or any [n, V] with an index."""
    x = logits if logits is not None else probs
    assert x is not None
    if index is not None and x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    V = x.shape[-1]
    C = -(-V // CHUNK)
    firsts, target_C = None, C
    if vocab is not None:
        vocab, target_C = vocab.contiguous(), -(-target_vocab // CHUNK)
        firsts = torch.empty(target_C + 2, dtype=torch.int32, device=x.device)
    stats = torch.empty((batch * rows, 3, C), dtype=torch.float32, device=x.device)
    floors = search = None
    if filtered and logits is not None:
        floors = torch.empty((batch * rows, 2), dtype=torch.float32, device=x.device)
        search = scratch_of(batch * rows, C, x.device)
    return LawRows(
        x,
        index,
        allowed,
        stats,
        floors,
        vocab,
        firsts,
        plain(x.shape[0]),
        rows,
        V,
        C,
        target_C,
        0 if index is not None else x.stride(0),
        x.stride(-2),
        *((0, 0) if index is None else index.stride()),
        *((0, 0) if allowed is None else allowed.stride()[:2]),
        tl.constexpr(logits is None),
        search,
    )
