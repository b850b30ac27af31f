"""A Hugging Face causal language model as the callable of pydecode's decode loops."""

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...decode.cache import PagedCache
from .attention import NAME, Step, register

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CausalLM:
    """A Hugging Face causal language model as the callable of pydecode's decode loops.

    ``logits = model(tokens, positions, cache, mask, num_tokens=None, keep=None)``: writes the rows'
    K/V into ``cache`` behind ``cache.lengths`` and attends under ``mask``. The lengths stay as they
    are; ``cache.commit`` moves them.

    The model is used as it is, in place: its attention implementation is set to "pydecode".
    ``backend``, which may be changed later, is that of ``tree_attention``; None: the fastest.

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

    def __init__(self, model: "PreTrainedModel", *, backend: str | None = None) -> None:
        _expect_supported(model)
        register()
        if model.config._attn_implementation != NAME:
            model.set_attn_implementation(NAME)
        self.model = model.eval()
        self.backend = backend
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
        slots = cache.slots(tokens.shape[1], num_tokens)  # raises before any work is done
        step = Step(cache, mask, num_tokens, positions.expand(tokens.shape), {}, self.backend)
        with torch.inference_mode():  # 5 % faster than no_grad at this size
            logits = self.model(
                input_ids=tokens,
                position_ids=step.positions,
                # four-dimensional, so taken as it is: no mask is made, nothing is read
                attention_mask=tokens.new_empty(0, 1, 1, 1),
                # A cache of transformers' own would hand the context over a second time.
                use_cache=False,
                past_key_values=None,
                logits_to_keep=0 if keep is None else keep,
                pydecode_step=step,
            ).logits
            if step.fresh:
                k, v = zip(*step.fresh.values())
                cache.write(tuple(step.fresh), k, v, slots)
        return logits.clone()  # one that may be changed in place

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


def _expect_supported(model: "PreTrainedModel") -> None:
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
