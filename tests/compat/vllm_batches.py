"""Random batches for the tests of vLLM's rejection samplers, and what the tests look at."""

from typing import Any

import pytest
import torch
from torch import Tensor

import pydecode

V = 6


def spy_on(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What reaches the operator: "args" and the keyword arguments, with those of "set" added."""
    seen: dict[str, Any] = {"set": {}}
    original = pydecode.rejection_sample

    def op(*args: Any, **kwargs: Any) -> Any:
        seen.update(args=args, **(kwargs := {**kwargs, **seen["set"]}))
        return original(*args, **kwargs)

    monkeypatch.setattr(pydecode, "rejection_sample", op)
    return seen


def logits_like(rows: int) -> Tensor:
    """fp64, so that no decision hangs on rounding; some ids forbidden, some values equal."""
    x = 2 * torch.randn(rows, V, dtype=torch.float64)
    x[torch.rand(rows, V) < 0.2] = -torch.inf
    x[torch.rand(rows) < 0.2] = 0.0
    x[torch.isneginf(x).all(-1)] = 0.0
    return x


def chain_law(p: Tensor, tokens: Tensor) -> float:
    """Distance between the frequency of the first two tokens and the target's law."""
    seen = torch.zeros(V, V, dtype=torch.float64)
    seen.index_put_((tokens[:, 0], tokens[:, 1]), torch.ones(len(tokens)).double(), accumulate=True)
    return 0.5 * float((seen / len(tokens) - p[0][:, None] * p[1]).abs().sum())
