"""``scaled_dot_product_attention`` without a mask: the same shapes, and for trees less work.

For trees it is no peer but a floor: what the fastest dense kernel here takes when every row sees
every key. For blocks it computes the same thing; causal prefill uses ``is_causal``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from . import Unsupported, dense

NAME = "SDPA, no mask"


def missing() -> str:
    return ""


def over_cache(*args: Any, **kwargs: Any) -> Callable[[], object]:
    q, (k, v) = dense.queries(args), dense.keys_and_values(args, kwargs)
    return lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True)


def ranked(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Callable[[], object]:
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    rank = kwargs["k_rank"]
    causal = torch.equal(rank, torch.arange(rank.shape[1], device=rank.device).expand_as(rank))
    if not causal and bool((rank != rank[:, :1]).any()):
        raise Unsupported("neither causal nor bidirectional")
    return lambda: scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


OPS = {"tree_attention": over_cache, "block_attention": over_cache, "ranked_attention": ranked}
