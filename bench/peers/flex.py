"""FlexAttention, compiled: the tree or the ranks as a mask_mod; block masks made beforehand."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pydecode.reference.attention import unpack_mask

from . import dense

NAME = "FlexAttention"


def missing() -> str:
    try:
        from torch.nn.attention import flex_attention  # noqa: F401
    except ImportError as error:
        return str(error)
    return ""


@functools.cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _call(q: Tensor, k: Tensor, v: Tensor, mask_mod: Any, B: int | None) -> Callable[[], object]:
    from torch.nn.attention.flex_attention import create_block_mask

    sizes = (B, None, q.shape[2], k.shape[2])
    blocks = create_block_mask(mask_mod, *sizes, device=q.device.type)
    return lambda: _compiled()(q, k, v, block_mask=blocks, enable_gqa=True)


def over_cache(*args: Any, **kwargs: Any) -> Callable[[], object]:
    q, (k, v) = dense.queries(args), dense.keys_and_values(args, kwargs)
    if kwargs.get("mask") is None:
        return lambda: _compiled()(q, k, v, enable_gqa=True)
    local = unpack_mask(kwargs["mask"], q.shape[2])
    n = k.shape[2] - q.shape[2]

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j < n) | local[b, i, (j - n).clamp(min=0)]

    return _call(q, k, v, mask_mod, q.shape[0])


def ranked(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Callable[[], object]:
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    q_rank, k_rank = kwargs["q_rank"][0], kwargs["k_rank"][0]

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return k_rank[j] <= q_rank[i]

    return _call(q, k, v, mask_mod, None)


OPS = {"tree_attention": over_cache, "block_attention": over_cache, "ranked_attention": ranked}
