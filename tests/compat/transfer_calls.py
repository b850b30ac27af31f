"""The transfer functions of all peers, with the same arguments."""

from typing import Any

import torch
from fake_diffusion import MASK

from pydecode.compat.diffusion.dinfer import (
    get_transfer_index_hierarchy_fast_v2,
    get_transfer_index_threshold,
)
from pydecode.compat.diffusion.dparallel import get_transfer_index_entropy
from pydecode.compat.diffusion.fast_dllm import get_transfer_index, get_transfer_index_dynamic

LOW = "low_confidence"


def call_of(name: str, temperature: float, remasking: str = LOW, **more: Any) -> Any:
    """One function with the same arguments: (logits, mask_index, x) -> (x0, transfer_index)."""
    sampling = (temperature, remasking)
    return {
        "fixed": lambda l, m, x: get_transfer_index(
            l, *sampling, m, x, torch.full((len(x),), 2), mask_id=MASK, **more
        ),
        "threshold": lambda l, m, x: get_transfer_index(
            l, *sampling, m, x, None, 0.3, mask_id=MASK, **more
        ),
        "factor": lambda l, m, x: get_transfer_index_dynamic(
            l, *sampling, m, x, None, 1.0, mask_id=MASK, **more
        ),
        "entropy": lambda l, m, x: get_transfer_index_entropy(
            l, *sampling, m, x, None, 0.5, mask_id=MASK, **more
        ),
        "dinfer": lambda l, m, x: get_transfer_index_threshold(
            l, temperature, m, x, MASK, 0.3, **more
        ),
        "hierarchy": lambda l, m, x: get_transfer_index_hierarchy_fast_v2(
            l, *sampling, m, x, None, MASK, 0.8, 0.3, **more
        ),
    }[name]


NAMES = ("fixed", "threshold", "factor", "entropy", "dinfer", "hierarchy")
