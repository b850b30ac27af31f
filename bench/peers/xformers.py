"""xformers' tree attention: one tree for the whole batch, an additive bias, dense caches."""

from collections.abc import Callable
from importlib import util
from typing import Any

import torch
from torch import Tensor

from . import Unsupported, dense

NAME = "xformers"


def missing() -> str:
    if util.find_spec("xformers") is None:
        return "xformers is not installed"
    if not torch.cuda.is_available():
        return "it needs a CUDA device"
    try:
        from xformers.ops.tree_attention import tree_attention  # noqa: F401
    except ImportError as error:
        return f"this xformers has no tree attention: {error}"
    return ""


def tree(*args: Any, **kwargs: Any) -> Callable[[], object]:
    """Dense caches, the bias of the first request's tree and the prefix's bias are made before."""
    from xformers.ops import fmha
    from xformers.ops.tree_attention import tree_attention

    if args[0].shape[0] != 1:
        raise Unsupported("one tree for the whole batch: compared at batch 1 only")
    q, _, _, k, _ = args
    B, N, Hq, D = q.shape
    Hkv = k.shape[2]
    keys, values = dense.keys_and_values(args, kwargs)
    n = keys.shape[2] - N
    visible = dense.mask(args, kwargs)
    if visible is None:
        raise Unsupported("nothing is masked")
    bias = torch.zeros(N, N, dtype=q.dtype, device=q.device)
    bias = bias.masked_fill(~visible[0, 0, :, n:], -torch.inf)

    def grouped(x: Tensor) -> Tensor:  # [B, S, G, H / G, D], as its GQA wants it
        return x.transpose(1, 2)[:, :, :, None].expand(-1, -1, -1, Hq // Hkv, -1)

    prefix = fmha.attn_bias.BlockDiagonalPaddedKeysMask.from_seqlens([N] * B, n, [n] * B)
    rows = q.view(B, N, Hkv, Hq // Hkv, D)
    spec = [grouped(x[:, :, n:]) for x in (keys, values)]
    cached = [grouped(x[:, :, :n]).reshape(1, B * n, Hkv, Hq // Hkv, D) for x in (keys, values)]
    return lambda: tree_attention(rows, *spec, *cached, bias, prefix)


OPS = {"tree_attention": tree}
