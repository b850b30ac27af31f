"""Rank tensors for ``ranked_attention``: a query sees a key iff the key's rank is at most its own.

Any pattern of groups in an order is a tensor of ranks; these are the common ones. A visual group
or a wavefront has one rank; padding has ``PAD``.
"""

import torch
from torch import Tensor

from .reference.ranked_attention import PAD as PAD
from .validation import INTS, expect_dim, expect_dtype


def causal(n: int, device: torch.device | str | None = None) -> Tensor:
    """Ranks 0 .. n-1, int32 [1, n]: token i sees tokens <= i.

    The last m queries over n keys (a chunk of a prefill) have the ranks ``causal(n)[:, n - m:]``.

    >>> import pydecode
    >>> pydecode.ranks.causal(4)
    tensor([[0, 1, 2, 3]], dtype=torch.int32)
    """
    _expect_size("n", n, 0)
    return torch.arange(n, dtype=torch.int32, device=device)[None]


def block_causal(n: int, block: int, device: torch.device | str | None = None) -> Tensor:
    """Ranks i // block, int32 [1, n]: token i sees its whole block and the earlier ones.

    >>> import pydecode
    >>> pydecode.ranks.block_causal(5, 2)
    tensor([[0, 0, 1, 1, 2]], dtype=torch.int32)
    """
    _expect_size("n", n, 0)
    _expect_size("block", block, 1)
    return (torch.arange(n, device=device) // block).to(torch.int32)[None]


def bidirectional(
    lengths: int | list[int] | Tensor, n: int, device: torch.device | str | None = None
) -> Tensor:
    """Rank 0 below each request's length and ``PAD`` from there on, int32 [B, n].

    Args:
        lengths: [B] int32/int64, or ints; one int gives B = 1. Lengths above n count as n.
        n: the padded length.
        device: default that of ``lengths``.

    >>> import pydecode
    >>> pydecode.ranks.bidirectional([2, 3], 3) == pydecode.ranks.PAD
    tensor([[False, False,  True],
            [False, False, False]])
    """
    _expect_size("n", n, 0)
    if isinstance(lengths, Tensor):
        expect_dim("lengths", lengths, 1, "[B]")
        expect_dtype("lengths", lengths, INTS)
        lengths = lengths.to(device) if device is not None else lengths
    else:
        listed = [lengths] if isinstance(lengths, int) else lengths
        if not isinstance(listed, (list, tuple)) or not all(type(x) is int for x in listed):
            raise TypeError(f"lengths: expected ints or an integer tensor [B], got {lengths!r}")
        lengths = torch.tensor(listed, dtype=torch.int64, device=device)
    i = torch.arange(n, device=lengths.device)
    return torch.where(i < lengths[:, None], 0, PAD).to(torch.int32)


def _expect_size(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an int >= {least}, got {value!r}")
