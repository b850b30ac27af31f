"""``scaled_dot_product_attention`` with a dense mask over dense K/V, both made beforehand."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from . import Unsupported, dense

NAME = "SDPA, dense mask"


def missing() -> str:
    return ""


def over_cache(*args: Any, **kwargs: Any) -> Callable[[], object]:
    q, (k, v) = dense.queries(args), dense.keys_and_values(args, kwargs)
    visible = dense.mask(args, kwargs)
    if visible is None:
        raise Unsupported("nothing is masked")
    return lambda: scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)


def ranked(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Callable[[], object]:
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    visible = kwargs["k_rank"][:, None, None, :] <= kwargs["q_rank"][:, None, :, None]
    return lambda: scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)


OPS = {"tree_attention": over_cache, "ranked_attention": ranked}
