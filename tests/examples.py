"""One small call of every op: (public function, args, kwargs) made afresh by ``EXAMPLES[op]()``.

The binding tests (opcheck, torch.compile, autograd, backends) are made from these.
"""

from collections.abc import Callable
from typing import Any

import torch

import pydecode

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def tree_attention() -> Call:
    q, k, v = torch.randn(2, 5, 4, 16), torch.randn(2, 5, 2, 16), torch.randn(2, 5, 2, 8)
    k_cache, v_cache = torch.randn(7, 4, 2, 16), torch.randn(7, 4, 2, 8)
    return (
        pydecode.tree_attention,
        (q, k_cache, v_cache, k, v),
        dict(
            mask=torch.rand(2, 5, 5) < 0.5,
            cache_seqlens=torch.tensor([3, 9]),
            block_table=torch.tensor([[3, 1, 5], [2, 0, 6]]),
            return_lse=True,
        ),
    )


EXAMPLES: dict[str, Callable[[], Call]] = {
    "tree_attention": tree_attention,
}
