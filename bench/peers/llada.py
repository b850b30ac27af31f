"""LLaDA's sampler: see samplers.py."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import samplers

NAME = "llada"


def missing() -> str:
    return ""


def unmask(tokens: Tensor, logits: Tensor, **kwargs: Any) -> Callable[[], object]:
    rule = samplers.llada
    return lambda: rule(logits, tokens, kwargs["mask_id"], kwargs["threshold"])


OPS = {"unmask": unmask}
