"""What peers without pages or packed masks are given: dense K/V and a dense mask. Not timed."""

from typing import Any

import torch
from torch import Tensor

from pydecode.reference.attention import unpack_mask


def keys_and_values(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Context and rows of ``tree_attention`` or ``block_attention``, [B, Hkv, S + N, D]."""
    _, k_cache, v_cache, k, v = args
    table = kwargs.get("block_table")
    n = int(kwargs["cache_seqlens"].max())
    result = []
    for cache, rows in ((k_cache, k), (v_cache, v)):
        context = cache[:, :n] if table is None else cache[table.long()].flatten(1, 2)[:, :n]
        result.append(torch.cat([context, rows], 1).transpose(1, 2).contiguous())
    return result[0], result[1]


def mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """bool [B, 1, N, S + N], True where a row looks; None if every row sees everything."""
    packed = kwargs.get("mask")
    if packed is None:
        return None
    N = args[0].shape[1]
    local = unpack_mask(packed, N)
    context = local.new_ones(*local.shape[:2], int(kwargs["cache_seqlens"].max()))
    return torch.cat([context, local], -1)[:, None]


def queries(args: tuple[Any, ...]) -> Tensor:
    """[B, Hq, N, D]."""
    q: Tensor = args[0].transpose(1, 2).contiguous()
    return q
