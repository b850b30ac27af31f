"""The attention function that pydecode registers with Hugging Face transformers.

- Handed a ``Step`` (by ``CausalLM``), it attends with ``tree_attention`` over a paged cache that
  lives outside the model, and leaves the rows' keys and values in the step, to be written;
- otherwise it takes the place of SDPA for any model: causal, bidirectional or cross attention under
  any mask, with ``ranked_attention``.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import pydecode
from pydecode import ranks, trees

from ...decode.cache import PagedCache
from .masks import make_mask, read_mask

NAME = "pydecode"

# What transformers passes on to attention functions, and no attention depends on.
_HARMLESS = frozenset(
    (
        *("use_cache", "output_hidden_states", "output_router_logits", "num_items_in_batch"),
        "deterministic",  # ModernBERT's wish to FlashAttention; ours always is
    )
)


class Step(NamedTuple):
    """What the attention of one forward pass needs to know; the same for all layers."""

    cache: PagedCache
    mask: Tensor | str
    num_tokens: Tensor | None
    positions: Tensor  # [B, N], rotary positions: a sliding window counts in these
    # layer -> its rows' own (k, v), for the caller to write once all layers are through
    fresh: dict[int, tuple[Tensor, Tensor]]
    backend: str | None = None  # of tree_attention


def register() -> None:
    """Registers the attention "pydecode" and its masks; importing this package has done so."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, make_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    pydecode_step: Step | None = None,
    position_ids: Tensor | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    output_attentions: bool | None = None,
    **unknown: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers' ``AttentionInterface``, in the place of SDPA.

    Replaces ``transformers.integrations.sdpa_attention.sdpa_attention_forward`` (5.23), with the
    soft caps and sinks that SDPA lacks.

    Args:
        query: [B, Hq, N, D]; key, value: [B, Hkv, S, D], already rotated; B of one is expanded.
        attention_mask: what ``make_mask`` gave, or the caller's own: bool (False hides) or floats
            (0, or -9000 and less, which hides), [B|1, 1, N|1, S]. It alone decides, windows too.
            None: causal or not as ``is_causal`` (or the module) says; causal queries are the last N
            of the S keys, as in FlashAttention.
        pydecode_step: a ``Step`` of ``CausalLM``, for a cache outside the model.
        position_ids: not looked at; masks are made of them before.

    Returns:
        out [B, N, Hq, Dv], and None for the weights, which are never made. A query that sees no key
        gives 0.

    Nothing synchronises. A float mask with other numbers in it (a bias) raises on the CPU and under
    ``pydecode.checks(True)``; where only the device knows, those rows give NaN.

    Raises:
        NotImplementedError: the model passes something that is not known here, by name; dropout; a
            bias; a mask that differs between heads.
        ValueError: a mask that does not fit.
    """
    for name, x in unknown.items():
        if x is not None and name not in _HARMLESS:
            raise NotImplementedError(f"{name}: not supported by attn_implementation={NAME!r}")
    if dropout:
        raise NotImplementedError(f"dropout: expected 0 ({NAME} is forward only), got {dropout}")
    if output_attentions:
        raise NotImplementedError("output_attentions: no attention weights are ever made")
    scores: dict[str, Any] = dict(
        softmax_scale=scaling, softcap=softcap or 0.0, window_size=sliding_window, sinks=s_aux
    )
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if pydecode_step is not None:
        # CausalLM gives an empty mask, so that transformers makes none
        masked = attention_mask is not None and attention_mask.numel()
        if masked or not _causal(module, is_causal):
            raise NotImplementedError("attention_mask, is_causal: the step's mask says it all")
        return _attend_step(pydecode_step, module.layer_idx, q, k, v, scores), None
    (B, _, N, _), (batch, _, S, _) = query.shape, key.shape
    if batch != B:  # learned queries, the same for all
        B = max(B, batch)
        q, k, v = (x.expand(B, -1, -1, -1) for x in (q, k, v))
    poison = None
    if attention_mask is None:
        seen = _without_mask(q, N, S, _causal(module, is_causal), scores)
    else:
        seen, poison = read_mask(attention_mask, B, N, S, module)
        scores["window_size"] = None
    layer = getattr(key, "_pydecode_layer", None)
    if layer is not None:  # a PydecodeCache: the pages are read where they lie
        pool = layer.cache.pool
        (k, v), seen["block_table"] = pool.layer(layer.index), pool.block_table
    out: Any = pydecode.ranked_attention(q, k, v, **seen, **scores)
    return out if poison is None else out + poison, None


def _causal(module: nn.Module, is_causal: bool | None) -> bool:
    return bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal


def _without_mask(
    q: Tensor, N: int, S: int, causal: bool, scores: dict[str, Any]
) -> dict[str, Any]:
    """Ranks of plain attention: causal, the last query at the last key; or everything."""
    if causal:
        k_rank = ranks.causal(S, q.device)
        return dict(q_rank=k_rank[:, S - N :], k_rank=k_rank)
    if scores["window_size"] is not None:
        raise NotImplementedError("sliding_window: without causality it needs an attention_mask")
    same = q.new_zeros(1, max(N, S), dtype=torch.int32)
    return dict(q_rank=same[:, :N], k_rank=same[:, :S])


def _attend_step(
    step: Step, layer: Any, q: Tensor, k: Tensor, v: Tensor, scores: dict[str, Any]
) -> Tensor:
    cache = step.cache
    if k.shape[1] != q.shape[1]:
        raise ValueError("past_key_values: expected none beside pydecode_step, which has the cache")
    k_cache, v_cache = cache.layer(layer)
    window = scores["window_size"]
    step.fresh[layer] = (k, v)
    out: Any = pydecode.tree_attention(
        *(q, k_cache, v_cache, k, v),
        mask=step.mask if window is None or q.shape[1] <= window else _windowed(step, window),
        cache_seqlens=cache.lengths,
        block_table=cache.block_table,
        num_tokens=step.num_tokens,
        positions=None if window is None else step.positions,
        backend=step.backend,
        **scores,
    )
    return out


def _windowed(step: Step, window: int) -> Tensor:
    """The step's mask less what lies outside a sliding window: bool [B, N, N].

    ``tree_attention`` lets the mask alone decide among rows in flight, and a chunk of a prompt may
    be wider than the window.
    """
    at = step.positions
    if isinstance(step.mask, str):
        i = torch.arange(at.shape[1], device=at.device)
        mask = i[:, None] >= i
    else:
        mask = trees.unpack_mask(step.mask, at.shape[1])
    return mask & (at[:, :, None] - at[:, None, :] < window)
