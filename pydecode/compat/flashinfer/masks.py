"""FlashInfer's bit masks: packed as it packs them, and read as the words of ``tree_attention``."""

from typing import NamedTuple

import torch
from torch import Tensor

from ...validation import checking, expect_choice, expect_dim, expect_dtype, expect_tensor
from . import page_lists
from .page_lists import Lengths


def packbits(x: Tensor, bitorder: str = "big") -> Tensor:
    """Packs a binary array into the bits of bytes, as ``numpy.packbits`` does.

    Replaces ``flashinfer.packbits`` (v0.6.18).

    Args:
        x: [n], any dtype; what is not 0 is a 1.
        bitorder: "big": the first entry is a byte's highest bit. "little": its lowest.

    Returns:
        uint8 [ceil(n/8)].

    >>> import torch
    >>> from pydecode.compat.flashinfer import packbits
    >>> packbits(torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 1]), "little")
    tensor([205,   1], dtype=torch.uint8)
    """
    _expect_bits(x, bitorder)
    padded = torch.nn.functional.pad(x.bool().view(torch.uint8), (0, -x.shape[0] % 8))
    return _weigh(padded.view(-1, 8), bitorder)


def segment_packbits(x: Tensor, indptr: Tensor, bitorder: str = "big") -> tuple[Tensor, Tensor]:
    """Packs each segment of a binary array on its own, from a new byte on.

    Replaces ``flashinfer.segment_packbits`` (v0.6.18), which synchronises to learn the size of y.
    Here y is just as long where ``indptr`` is on the host; where it is on a device, y has its upper
    bound, ``(n + 7 * segments) // 8`` bytes, and what lies past ``new_indptr[-1]`` is 0.

    Args:
        x: [n], any dtype; what is not 0 is a 1. Segment i is ``x[indptr[i]:indptr[i+1]]``.
        indptr: [segments+1], int32 or int64.
        bitorder: as in ``packbits``.

    Returns:
        y uint8, and new_indptr int32 [segments+1], on indptr's device: where each segment's bytes
        start.

    >>> import torch
    >>> from pydecode.compat.flashinfer import segment_packbits
    >>> segment_packbits(torch.tensor([1, 0, 1, 1, 1]), torch.tensor([0, 3, 5]), "little")
    (tensor([5, 3], dtype=torch.uint8), tensor([0, 1, 2], dtype=torch.int32))
    """
    _expect_bits(x, bitorder)
    expect_dim("indptr", expect_tensor("indptr", indptr), 1, "[segments+1]")
    indptr = indptr.long()
    size = ((indptr[1:] - indptr[:-1]) + 7) >> 3
    bytes_before = torch.nn.functional.pad(size.cumsum(0), (1, 0))
    n, segments = x.shape[0], indptr.shape[0] - 1
    exact = page_lists.on_host(indptr)
    length = int(bytes_before[-1]) if exact else (n + 7 * segments) // 8
    if n == 0 or segments == 0:
        return x.new_zeros(length, dtype=torch.uint8), bytes_before.int()
    first, end, start = (p.to(x.device) for p in (indptr[:-1], indptr[1:], bytes_before[:-1]))
    byte = torch.arange(length, device=x.device)
    owner = torch.searchsorted(start, byte, right=True) - 1
    at = (first[owner] + 8 * (byte - start[owner]))[:, None] + torch.arange(8, device=x.device)
    bits = x.bool()[at.clamp(0, n - 1)] & (at < end[owner, None])
    return _weigh(bits.view(torch.uint8), bitorder), bytes_before.int()


def _expect_bits(x: Tensor, bitorder: str) -> None:
    expect_dim("x", expect_tensor("x", x), 1, "[n]")
    expect_choice("bitorder", bitorder, ("big", "little"))


def _weigh(bits: Tensor, bitorder: str) -> Tensor:
    """uint8 0 or 1 [n, 8] -> bytes [n]."""
    ends = (0, 8, 1) if bitorder == "little" else (7, -1, -1)
    place = torch.arange(*ends, dtype=torch.uint8, device=bits.device)
    return (bits << place).sum(-1, dtype=torch.uint8)


# ---- the rows of a mask -------------------------------------------------------------------------


class Places(NamedTuple):
    """Where each request's bits lie, int64 [B] each: row i sees column 0 by ``first + i * stride``.

    Read from there on, columns are keys; from ``context`` on, rows in flight: then columns before
    key 0 and past the last row are made up, for nothing lies there that could be seen.
    """

    first: Tensor
    stride: Tensor
    context: Tensor


def of_plan(
    custom_mask: Tensor | None,
    packed_custom_mask: Tensor | None,
    lengths: Lengths,
    whole: bool,
    pack: bool,
) -> tuple[Tensor, Places]:
    """The bits of a plan's mask, and where each request's are. Packed counts if both are given.

    A mask of bools stays as it is unless ``pack``.
    """
    size = lengths.rows * lengths.keys
    if packed_custom_mask is not None:
        name, mask = "packed_custom_mask", expect_tensor("packed_custom_mask", packed_custom_mask)
        expect_dtype(name, mask, (torch.uint8,))
        size = (size + 7) & -8  # each request from a new byte on
        bits, got = mask.reshape(-1), 8 * mask.numel()
    else:
        name, mask = "custom_mask", expect_tensor("custom_mask", custom_mask)
        expect_dtype(name, mask, (torch.bool, torch.uint8))
        flat, got = mask.reshape(-1), mask.numel()
        # a copy: what the caller does to the mask after the plan is not seen
        bits = packbits(flat, "little") if pack or checking() else flat != 0
    if page_lists.on_host(size) or checking():
        want = int(size.sum())
        if got < want or (got > want and packed_custom_mask is None):
            raise ValueError(
                f"{name}: expected an entry for every row and key of each request, {want}, "
                f"got {got}"
            )
    start = size.cumsum(0) - size
    if checking() and not whole:
        _check_prefix(name, bits, start, lengths)
    return bits, Places(start, lengths.keys, lengths.context)


def _check_prefix(name: str, bits: Tensor, start: Tensor, lengths: Lengths) -> None:
    """Every row sees all keys before the rows in flight. Synchronises."""
    bit = (bits[:, None] >> torch.arange(8, device=bits.device) & 1).flatten()
    for b, (first, rows, keys, context) in enumerate(torch.stack((start, *lengths)).T.tolist()):
        seen = bit[first : first + rows * keys].view(rows, keys)[:, : max(context, 0)]
        hidden = (seen == 0).nonzero()
        if hidden.numel():
            i, j = hidden[0].tolist()
            raise ValueError(
                f"{name}: expected every row to see all keys before the rows in flight, "
                f"got row {i} of request {b} that does not see key {j} of {context}"
            )


def uniform_places(lengths: Lengths, causal: bool, n: int) -> Places:
    """Of what ``causal_bits(n)`` says of up to n rows in flight: the causal mask, or all ones."""
    zero = torch.zeros_like(lengths.rows)
    return Places(zero + (n - 1), zero - 1, zero) if causal else Places(zero, zero, zero)


def causal_bits(n: int, device: torch.device) -> Tensor:
    """n ones and n zeros as bytes: from bit n - 1 - i on, the first i + 1 bits are ones."""
    return packbits(torch.arange(2 * n, device=device) < n, "little")


def rows_mask(
    bits: Tensor, places: Tensor, qo_indptr: Tensor, total: int, words: int, whole: bool
) -> Tensor:
    """The packed mask [total, words] of a packed batch; columns are keys if ``whole``."""
    owner, i = page_lists.owners(qo_indptr, total)
    first, stride, context = places[:, owner]
    first = first + i * stride
    return read_words(bits, first if whole else first + context, words)


def rows_window(qo_indptr: Tensor, total: int, words: int, window_left: int) -> Tensor:
    """As ``rows_mask``: each sees the rows in flight from ``window_left`` before it on."""
    _, i = page_lists.owners(qo_indptr, total)
    return ~low_bits(i.long() - window_left, words)


def read_words(bits: Tensor, first: Tensor, words: int) -> Tensor:
    """The 64 * words bits from bit ``first`` [rows] on, little end first, as int64 [rows, words].

    Bits past either end of ``bits`` (uint8 or bool, flat) are made up.
    """
    if bits.shape[0] == 0:
        return first.new_zeros(first.shape[0], words)
    if bits.dtype == torch.bool:
        at = first[:, None] + torch.arange(64 * words, device=bits.device)
        seen = bits[at.clamp_(0, bits.shape[0] - 1)]
        return (
            _weigh(seen.view(torch.uint8).view(-1, 8), "little")
            .view(-1, 8 * words)
            .view(first.dtype)
        )
    # one byte more than is wanted, for a row may start inside a byte
    at = (first >> 3)[:, None] + torch.arange(8 * words + 1, device=bits.device)
    byte = bits[at.clamp_(0, bits.shape[0] - 1)].int()
    both = byte[:, :-1] | byte[:, 1:] << 8
    return (both >> (first & 7)[:, None]).to(torch.uint8).view(torch.int64)


def low_bits(count: Tensor, words: int) -> Tensor:
    """Words whose first ``count`` [rows] bits are ones, int64 [rows, words]."""
    rest = count[:, None] - torch.arange(0, 64 * words, 64, device=count.device)
    ones = (torch.ones_like(rest) << rest.clamp(0, 63)) - 1
    return torch.where(rest >= 64, -1, ones)
