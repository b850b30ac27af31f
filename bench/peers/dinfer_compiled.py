"""dInfer's rule, compiled: see samplers.py."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import samplers

NAME = "dinfer compiled"


def missing() -> str:
    return ""


def unmask(tokens: Tensor, logits: Tensor, **kwargs: Any) -> Callable[[], object]:
    rule = torch.compile(samplers.dinfer, dynamic=False)
    return lambda: rule(logits, tokens, kwargs["mask_id"], kwargs["threshold"])


OPS = {"unmask": unmask}
