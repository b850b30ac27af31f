"""Models of integer arithmetic with the peers' signatures: every logit depends on all that the
model sees, its cache too, and every call is remembered.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

V, MASK = 24, 23
STATES = 499


def table(seed: int = 0, *, mask_logit: float = -40.0, sure: float = 3.0) -> Tensor:
    """[STATES, V] fp64 logits; the mask is never preferred, unless mask_logit says so."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(STATES, V, generator=g, dtype=torch.float64) * sure
    logits[:, MASK] = mask_logit
    return logits


def states(keys: Tensor, tokens: Tensor, at: Tensor) -> Tensor:
    """[B, n] rows of the table; keys [B, S, 3] are (token, position, seen)."""
    sums = ((keys[..., 0] + 3) * (keys[..., 1] * 29 + 7) * keys[..., 2]).sum(-1, keepdim=True)
    return (sums + tokens * 5 + at * 11) % STATES


class FullModel:
    """LLaDA (attention_mask), Fast-dLLM (caches), Dream (tok_idx): bidirectional attention."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.device = logits, logits.device
        self.calls: list[Any] = []

    def __call__(
        self,
        x: Tensor,
        attention_mask: Tensor | str | None = None,
        tok_idx: Tensor | None = None,
        *,
        past_key_values: Any = None,
        use_cache: bool = False,
        replace_position: Tensor | None = None,
    ) -> Any:
        B, n = x.shape
        seen = torch.ones_like(x)
        if isinstance(attention_mask, Tensor):
            pairs = attention_mask.dim() == 4  # Dream's [B, 1, N, N]: its last row sees all that is
            seen = attention_mask[:, 0, -1].long() if pairs else attention_mask
        past = None if past_key_values is None else past_key_values[0][0]
        self.calls.append(
            [listed(y) for y in (x, attention_mask, tok_idx, past, use_cache, replace_position)]
        )
        start = 0 if past is None or replace_position is not None else past.shape[2]
        at = start + torch.arange(n, device=x.device).expand(B, n)
        if replace_position is not None:
            at = replace_position.nonzero()[:, 1].view(B, n)
        if tok_idx is not None:
            at = tok_idx
        # a key depends on all that its pass saw, so that a cached one grows stale
        k = torch.stack([x + x.sum(-1, keepdim=True) % 17, at, seen], -1)[:, None]
        if past is not None and replace_position is not None:
            past[:, :, at[0]] = k  # in place, as Fast-dLLM's attention
            k = past
        elif past is not None:
            k = torch.cat([past, k], 2)
        out = self.logits[states(k[:, 0], x, at)]
        return SimpleNamespace(logits=out, past_key_values=[(k, k.clone())] if use_cache else None)


class BlockModel:
    """SDAR: a block sees what its attention_mask says of the cache and itself."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.device = logits, logits.device
        self.calls: list[Any] = []
        self.training = True

    def eval(self) -> None:
        self.training = False

    def __call__(
        self,
        x: Tensor,
        *,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Any,
        use_cache: bool,
        store_kv: bool,
    ) -> Any:
        assert use_cache
        assert not self.training
        at = position_ids.expand_as(x)
        fresh = torch.stack([x, at], -1)
        stored = getattr(past_key_values, "stored", None)
        keys = fresh if stored is None else torch.cat([stored, fresh], 1)
        self.calls.append([listed(y) for y in (x, attention_mask, position_ids, stored, store_kv)])
        if store_kv:
            past_key_values.stored = keys
        seen = attention_mask[:, -1:].long().expand(len(x), 1, -1).transpose(1, 2)
        return SimpleNamespace(logits=self.logits[states(torch.cat([keys, seen], -1), x, at)])


def listed(y: Any) -> Any:
    return y.tolist() if isinstance(y, Tensor) and y.device.type == "cpu" else y
