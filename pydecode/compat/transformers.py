"""Hugging Face transformers on pydecode's attention: the function, and the adapter for the loops.

Importing this module registers the attention implementation "pydecode", so that any model that
supports attention backends takes it (``from_pretrained(..., attn_implementation="pydecode")``):

- handed a ``Step`` (by ``CausalLM``), it writes the rows' keys and values into a paged cache that
  lives outside the model and attends with ``tree_attention``;
- otherwise it is plain attention over what the model hands over, with ``ranked_attention``.

Written for transformers 5.23. A model that passes something this function does not know raises.
"""

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

import pydecode

from ..decode.cache import PagedCache

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
    slots: Tensor  # [B, N], where the rows' K/V are written
    positions: Tensor  # [B, N], rotary positions: a sliding window counts in these


def register() -> None:
    """Registers the attention implementation "pydecode"; importing this module has done so.

    Only the attention: transformers builds no mask for a name that is not in its mask interface.
    """
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
    never arrives here: **transformers drops it** for implementations without a mask function. Left
    padding is known from ``position_ids`` instead, which ``generate`` makes from the mask; right
    padding needs nothing under a causal mask. A four-dimensional mask arrives and is obeyed.

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
    pydecode.write_kv(k, v, k_cache, v_cache, positions=step.slots, block_table=cache.block_table)
    return pydecode.tree_attention(
        *(q, k_cache, v_cache, k, v),
        mask=step.mask,
        cache_seqlens=cache.lengths,
        block_table=cache.block_table,
        num_tokens=step.num_tokens,
        positions=None if scores["window_size"] is None else step.positions,
        **scores,
    )


def _attend_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_ids: Tensor | None,
    causal: bool,
    scores: dict[str, Any],
) -> Tensor:
    """Causal (bottom right aligned) or bidirectional attention without a mask."""
    N, S = q.shape[1], k.shape[1]
    k_rank = torch.arange(S, dtype=torch.int32, device=q.device)[None]
    q_rank = k_rank[:, S - N :]
    if not causal:
        q_rank = torch.full_like(q_rank, S)
    elif position_ids is not None:
        padding = _left_padding(position_ids, S)
        k_rank = torch.where(k_rank < padding[:, None], S, k_rank)
    return pydecode.ranked_attention(q, k, v, q_rank=q_rank, k_rank=k_rank, **scores)


def _left_padding(position_ids: Tensor, S: int) -> Tensor:
    """How many keys of each request are padding [B|1], judged by the last row's position.

    Positions that do not count up from there (packed sequences, a tree) raise. It reads data, so
    that transformers' own loop synchronises once a forward pass.
    """
    known = getattr(position_ids, "_pydecode_left_padding", None)
    if known is not None:
        return known
    if position_ids.dim() != 2:
        raise NotImplementedError(
            f"position_ids: expected [B, N] or no mask to guess, got {list(position_ids.shape)}"
        )
    padding = (S - 1 - position_ids[:, -1]).clamp(min=0)
    at = torch.arange(S - position_ids.shape[1], S, device=position_ids.device)
    counts_up = position_ids - position_ids[:, -1:] == at - (S - 1)
    if not bool((counts_up | (at < padding[:, None])).all()):
        raise NotImplementedError(
            "position_ids: expected to count up from the padding on; packed sequences and trees "
            "need a four-dimensional attention_mask"
        )
    position_ids._pydecode_left_padding = padding  # type: ignore[attr-defined]
    return padding


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
    if scores["window_size"] is not None:
        scores = {**scores, "window_size": None}  # such a mask has the window in it already
    visible = attention_mask[:, 0]
    if visible.dtype != torch.bool:
        hidden = visible <= torch.finfo(visible.dtype).min / 2
        if not bool((hidden | (visible == 0)).all()):
            raise NotImplementedError("attention_mask: a bias other than 0 and -inf")
        visible = ~hidden
    # all S keys as rows in flight behind no context; the first S - N rows are not wanted
    visible = nn.functional.pad(visible.long(), (0, 0, S - N, 0)).bool()
    q = nn.functional.pad(q, (0, 0, 0, 0, S - N, 0))
    out = pydecode.tree_attention(q, k[:, :0], v[:, :0], k, v, mask=visible, **scores)
    return out[:, S - N :]


class CausalLM:
    """A Hugging Face causal language model as the callable of pydecode's decode loops.

    ``logits = model(tokens, positions, cache, mask, num_tokens=None, keep=None)``: writes the rows'
    K/V into ``cache`` behind ``cache.lengths`` and attends under ``mask``. The lengths stay as they
    are; ``cache.commit`` moves them.

    The model is used as it is, in place: its attention implementation is set to "pydecode".

    >>> import torch, transformers
    >>> from pydecode.compat.transformers import CausalLM
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2)
    >>> model = CausalLM(transformers.LlamaForCausalLM(config))
    >>> cache = model.new_cache(batch=1, capacity=100)
    >>> tokens = torch.tensor([[7, 8, 9]])
    >>> model(tokens, torch.arange(3)[None], cache, "causal").shape
    torch.Size([1, 3, 50])
    """

    def __init__(self, model: PreTrainedModel) -> None:
        _expect_supported(model)
        register()
        if model.config._attn_implementation != NAME:
            model.set_attn_implementation(NAME)
        self.model = model.eval()
        self.config = model.config.get_text_config(decoder=True)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def eos_token_ids(self) -> set[int]:
        """Tokens that end a text, from the generation config."""
        eos = getattr(self.model.generation_config, "eos_token_id", None)
        return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)

    def new_cache(
        self,
        batch: int,
        capacity: int,
        *,
        page_size: int = 16,
        dtype: torch.dtype | None = None,
        shuffle: bool = False,
    ) -> PagedCache:
        """An empty cache that fits this model; ``dtype``: default the model's."""
        config = self.config
        heads = config.num_attention_heads
        return PagedCache(
            *(config.num_hidden_layers, batch, capacity),
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            page_size=page_size,
            dtype=dtype or self.model.dtype,
            device=self.device,
            shuffle=shuffle,
        )

    @torch.no_grad()
    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: PagedCache,
        mask: Tensor | str,
        num_tokens: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """One forward pass over rows in flight.

        Args:
            tokens: [B, N]. positions: [B, N], rotary positions (a tree node's: its depth behind
                ``cache.lengths``).
            mask: packed [B|1, N, ceil(N/64)], or "causal".
            num_tokens: [B], valid rows of a ragged batch. keep: [K], the rows whose logits are
                wanted; None: all.

        Returns:
            logits [B, N or K, V].
        """
        slots = cache.slots(tokens.shape[1], num_tokens)
        return self.model(
            input_ids=tokens,
            position_ids=positions,
            # A cache of transformers' own would hand the context over a second time.
            use_cache=False,
            past_key_values=None,
            logits_to_keep=0 if keep is None else keep,
            pydecode_step=Step(cache, mask, num_tokens, slots, positions),
        ).logits

    def skipping(self, layers: Iterable[int]) -> "CausalLM":
        """The same weights without some decoder layers: a draft of itself, on the same cache.

        A layer that stays keeps its own slots in the cache, so the context's K/V serve both, and
        verification writes over the rows that a draft has written.
        """
        drop = set(layers)
        decoder = self.model.base_model
        num_layers = len(getattr(decoder, "layers", ()))
        if not drop <= set(range(num_layers)):
            raise ValueError(f"layers: expected some of 0 .. {num_layers - 1}, got {sorted(drop)}")
        kept = nn.ModuleList(x for i, x in enumerate(decoder.layers) if i not in drop)
        shorter = _with_module(decoder, "layers", kept)
        result = copy.copy(self)
        result.model = _with_module(self.model, self.model.base_model_prefix, shorter)
        return result


def _with_module(parent: nn.Module, name: str, child: nn.Module) -> Any:
    """A shallow copy of a module with one submodule replaced; all else is shared."""
    result = copy.copy(parent)
    result._modules = {**parent._modules, name: child}
    return result


def _expect_supported(model: PreTrainedModel) -> None:
    """Models whose cache is not one K and one V a layer need handling of their own."""
    name = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False):
        raise NotImplementedError(f"model: {name} does not support attention backends")
    config = model.config.get_text_config(decoder=True)
    for field in ("kv_lora_rank", "num_kv_shared_layers"):
        if getattr(config, field, None):
            raise NotImplementedError(f"model: {name} has {field}, which is not supported")
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds <= {"full_attention", "sliding_attention"}:
        raise NotImplementedError(f"model: {name} has layers of {sorted(kinds)}")


register()
