"""``torch.compile`` of the formulas in eager.py."""

from collections.abc import Callable
from typing import Any

import torch

from . import Prepare, eager

NAME = "torch.compile"


def missing() -> str:
    return ""


def compiled(prepare: Prepare) -> Prepare:
    def prepare_compiled(*args: Any, **kwargs: Any) -> Callable[[], object]:
        call: Callable[[], object] = torch.compile(prepare(*args, **kwargs), dynamic=False)
        return call

    return prepare_compiled


OPS: dict[str, Prepare] = {op: compiled(prepare) for op, prepare in eager.OPS.items()}
