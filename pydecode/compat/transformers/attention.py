"""The attention function that pydecode registers with Hugging Face transformers.

- Handed a ``Step`` (by ``CausalLM``), it attends with ``tree_attention`` over a paged cache that
  lives outside the model, and leaves the rows' keys and values in the step, to be written;
- otherwise it is plain attention over what the model hands over, with ``ranked_attention``.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import pydecode
from pydecode import ranks, trees

from ...decode.cache import PagedCache

NAME = "pydecode"

# What transformers passes on to attention functions, and no attention depends on.
_HARMLESS = frozenset(
    ("use_cache", "output_hidden_states", "output_router_logits", "num_items_in_batch")
)


class Step(NamedTuple):
    """What the attention of one forward pass needs to know; the same for all layers."""

    cache: PagedCache
    mask: Tensor | str
    num_tokens: Tensor | None
    positions: Tensor  # [B, N], rotary positions: a sliding window counts in these
    # layer -> its rows' own (k, v), for the caller to write once all layers are through
    fresh: dict[int, tuple[Tensor, Tensor]]


def register() -> None:
    """Registers the attention implementation "pydecode"; importing this module has done so.

    Only the attention: transformers builds no mask for a name that is not in its mask interface.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)


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
    """An attention function of transformers' ``AttentionInterface``.

    query [B, Hq, N, D], key and value [B, Hkv, S, D], already rotated -> out [B, N, Hq, Dv], None.

    Without a ``Step`` the N queries are the last N of the S keys. A padding mask of two dimensions
    never arrives here: **transformers drops it** for implementations without a mask function. What
    ``position_ids`` tell of padding (as they do under ``generate``) raises; a padded batch without
    position_ids cannot be told from a full one: right padding is harmless there (no token sees it),
    left padding is not. A four-dimensional mask arrives and is obeyed.

    Raises:
        NotImplementedError: the model passes something that is not known here, by name.
    """
    for name, x in unknown.items():
        if x is not None and name not in _HARMLESS:
            raise NotImplementedError(f"{name}: not supported by attn_implementation={NAME!r}")
    if dropout:
        raise NotImplementedError(f"dropout: expected 0 ({NAME} is forward only), got {dropout}")
    if output_attentions:
        raise NotImplementedError("output_attentions: no attention weights are ever made")
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    scores = dict(
        softmax_scale=scaling, softcap=softcap or 0.0, window_size=sliding_window, sinks=s_aux
    )
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if pydecode_step is not None:
        if attention_mask is not None or not causal:
            raise NotImplementedError("attention_mask, is_causal: the step's mask says it all")
        return _attend_step(pydecode_step, module.layer_idx, q, k, v, scores), None
    if attention_mask is not None:
        return _attend_masked(q, k, v, attention_mask, scores), None
    return _attend_plain(q, k, v, position_ids, causal, scores), None


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


def _attend_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_ids: Tensor | None,
    causal: bool,
    scores: dict[str, Any],
) -> Tensor:
    """Causal (bottom right aligned) or bidirectional attention over everything, nothing padded."""
    B, N, S = q.shape[0], q.shape[1], k.shape[1]
    k_rank = ranks.causal(S, q.device)
    q_rank = k_rank[:, S - N :]
    if causal:
        _expect_unpadded(position_ids, B, N, S)
    elif B == 1 and scores["window_size"] is None:
        q_rank = torch.full((1, N), S, dtype=torch.int32, device=q.device)
    else:
        raise NotImplementedError(
            "is_causal=False: more than one sequence (which may be padded) or a window needs a "
            "four-dimensional attention_mask"
        )
    out: Any = pydecode.ranked_attention(q, k, v, q_rank=q_rank, k_rank=k_rank, **scores)
    return out


def _expect_unpadded(position_ids: Tensor | None, B: int, N: int, S: int) -> None:
    """The last of S keys belongs to the last query, and no key is padding, as positions tell.

    They are all there is to tell: padded batches, static caches (whose tail is empty), packed
    sequences and trees come without a mask. Reads data, once a forward pass.
    """
    if position_ids is None:
        if B > 1 or S != N:
            raise NotImplementedError("position_ids: without them a batch or a cache needs a mask")
        return
    if getattr(position_ids, "_pydecode_unpadded", None) == S:
        return
    if position_ids.dim() != 2:
        raise NotImplementedError(
            f"position_ids: expected [B, N], got shape {list(position_ids.shape)}"
        )
    last = position_ids[:, -1:]
    counts_up = position_ids - last == torch.arange(1 - N, 1, device=position_ids.device)
    if not bool((counts_up & (last >= S - 1)).all()):
        raise NotImplementedError(
            f"position_ids: expected to count up to the last of {S} keys. transformers hands "
            "padded batches, static caches, packed sequences and trees to this attention without a "
            "mask; give a four-dimensional attention_mask"
        )
    position_ids._pydecode_unpadded = S  # type: ignore[attr-defined]


def _attend_masked(
    q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor, scores: dict[str, Any]
) -> Tensor:
    """Attention under an explicit mask [B|1, 1, N, S], bool or additive with 0 and -inf."""
    N, S = q.shape[1], k.shape[1]
    if attention_mask.dim() != 4 or attention_mask.shape[1] != 1:
        raise NotImplementedError(
            f"attention_mask: expected [B|1, 1, N, S], got {list(attention_mask.shape)}"
        )
    if attention_mask.shape[2:] != (N, S):
        raise ValueError(
            f"attention_mask: expected [B|1, 1, {N}, {S}], got {list(attention_mask.shape)}"
        )
    visible = attention_mask[:, 0]
    if visible.dtype != torch.bool:
        hidden = visible <= torch.finfo(visible.dtype).min / 2
        if not bool((hidden | (visible == 0)).all()):
            raise NotImplementedError("attention_mask: a bias other than 0 and -inf")
        visible = ~hidden
    # All S keys as rows in flight behind no context, so that the mask alone decides (it has the
    # window in it, if there is one); the first S - N rows are not wanted.
    visible = nn.functional.pad(visible.long(), (0, 0, S - N, 0)).bool()
    q = nn.functional.pad(q, (0, 0, 0, 0, S - N, 0))
    out: Any = pydecode.tree_attention(q, k[:, :0], v[:, :0], k, v, mask=visible, **scores)
    return out[:, S - N :]
