"""dInfer's rule: see samplers.py."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import samplers

NAME = "dinfer"


def missing() -> str:
    return ""


def unmask(tokens: Tensor, logits: Tensor, **kwargs: Any) -> Callable[[], object]:
    rule = samplers.dinfer
    return lambda: rule(logits, tokens, kwargs["mask_id"], kwargs["threshold"])


OPS = {"unmask": unmask}
