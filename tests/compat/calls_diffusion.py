"""The adapters of ``pydecode.compat.diffusion``: see adapters.py."""

from collections.abc import Callable
from typing import Any

import torch
from adapters import Adapter, Call
from torch import Tensor

from pydecode.compat.diffusion import dinfer, dparallel, dream, fast_dllm, llada, sdar

L, V, MASK = 8, 50, 49


def logits(batch: int) -> Tensor:
    return torch.randn(batch, L, V)


def block(batch: int) -> tuple[Tensor, Tensor]:
    """mask_index and x, half of which are masks."""
    masked = torch.arange(L).expand(batch, L) % 2 == 0
    return masked, torch.where(masked, MASK, 5)


def transfer(function: Callable[..., Any], *rest: Any, **more: Any) -> Callable[[int], Call]:
    def make(batch: int) -> Call:
        return function, (logits(batch), 0.0, "low_confidence", *block(batch), *rest), more

    return make


def schedule(batch: int) -> Call:
    llada.get_num_transfer_tokens(block(1)[0], 3)  # two constants of 3 steps are made once
    return llada.get_num_transfer_tokens, (block(batch)[0], 3), {}


def fixed(batch: int) -> Call:
    quotas = torch.ones(batch, dtype=torch.int64)
    args = (logits(batch), 0.0, "low_confidence", *block(batch), quotas)
    return fast_dllm.get_transfer_index, args, {"mask_id": MASK}


def drawn(batch: int) -> Call:
    args = (logits(batch), 0.7, "low_confidence", *block(batch), None, 0.9)
    return fast_dllm.get_transfer_index, args, {"mask_id": MASK}


def dinfer_threshold(batch: int) -> Call:
    return dinfer.get_transfer_index_threshold, (logits(batch), 0.0, *block(batch), MASK, 0.9), {}


def decoder(kind: Callable[..., Any]) -> Callable[[int], Call]:
    def make(batch: int) -> Call:
        one = kind(temperature=0.0, threshold=0.9, mask_id=MASK)

        def decode(given: Tensor, x: Tensor) -> None:
            one.decode(given, 4, 4 + L, x)

        x = torch.cat([torch.ones(batch, 4, dtype=torch.long), block(batch)[1]], 1)
        return decode, (logits(batch), x), {}

    return make


CALLS: dict[str, Adapter] = {
    "get_num_transfer_tokens": Adapter(schedule),
    "get_transfer_index, schedule": Adapter(fixed),
    "get_transfer_index, drawn": Adapter(drawn),
    "get_transfer_index, threshold": Adapter(
        transfer(fast_dllm.get_transfer_index, None, 0.9, mask_id=MASK)
    ),
    "get_transfer_index_dynamic": Adapter(
        transfer(fast_dllm.get_transfer_index_dynamic, None, 1.0, mask_id=MASK)
    ),
    "get_transfer_index_dynamic, as theirs": Adapter(
        transfer(
            fast_dllm.get_transfer_index_dynamic, None, 1.0, mask_id=MASK, bug_compatible=True
        ),
    ),
    "get_transfer_index_entropy": Adapter(
        transfer(dparallel.get_transfer_index_entropy, None, 0.5, mask_id=MASK)
    ),
    "get_transfer_index_threshold": Adapter(dinfer_threshold),
    "get_transfer_index_hierarchy_fast_v2": Adapter(
        transfer(dinfer.get_transfer_index_hierarchy_fast_v2, None, MASK, 0.9, 0.4),
    ),
    "sample_tokens": Adapter(lambda batch: (dream.sample_tokens, (logits(batch), 0.0, 0.9), {})),
    "sample_tokens, drawn": Adapter(
        lambda batch: (dream.sample_tokens, (logits(batch), 0.7, 0.9), {})
    ),
    "sample_with_temperature_topk_topp": Adapter(
        lambda batch: (sdar.sample_with_temperature_topk_topp, (logits(batch), 1.0, 5, 0.9), {}),
    ),
    "ThresholdParallelDecoder": Adapter(decoder(dinfer.ThresholdParallelDecoder)),
    "HierarchyDecoder": Adapter(decoder(dinfer.HierarchyDecoder)),
    "CreditThresholdParallelDecoder": Adapter(
        decoder(dinfer.CreditThresholdParallelDecoder),
        not_compiled="keeps the credit of its rows from call to call",
    ),
}
