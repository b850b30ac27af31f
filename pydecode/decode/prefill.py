"""Prompts into the cache, before a loop begins and wherever a draft model lags behind."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .cache import PagedCache


def prefill(
    model: Callable[..., Tensor], prompts: Sequence[Sequence[int]], cache: PagedCache, chunk: int
) -> None:
    """Puts the prompts' keys and values into the cache, ``chunk`` rows a pass."""
    device = cache.lengths.device
    for start in range(0, max(map(len, prompts), default=0), chunk):
        parts = [list(prompt[start : start + chunk]) for prompt in prompts]
        width = max(map(len, parts))
        counts = torch.tensor([len(part) for part in parts], device=device)
        rows = torch.tensor([part + [0] * (width - len(part)) for part in parts], device=device)
        at = cache.lengths[:, None] + torch.arange(width, device=device)
        none = torch.zeros(1, dtype=torch.int64, device=device)  # one row of logits, unused
        model(rows, at, cache, "causal", num_tokens=counts, keep=none)
        cache.lengths += counts
