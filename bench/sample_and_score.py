"""Sampling rows of logits: greedy, tempered, and with top-k and top-p."""

from collections.abc import Iterator
from typing import Any

import torch

from .workload import Inputs, Workload

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": dict(temperature=0.8),
    "top_k_top_p": dict(temperature=0.8, top_k=50, top_p=0.9),
    "gumbel": dict(temperature=0.8, sampler="gumbel"),
}


def workloads() -> Iterator[Workload]:
    for kind in KINDS:
        for B in (1, 32, 256):
            yield workload(kind, B, 128256, torch.bfloat16, quick=B == 32 and kind != "gumbel")


def workload(kind: str, B: int, V: int, dtype: torch.dtype, *, quick: bool = False) -> Workload:
    def make(device: torch.device) -> Inputs:
        logits = torch.randn(B, V, dtype=dtype, device=device) * 3
        return (logits,), dict(KINDS[kind], seed=torch.arange(B, device=device))

    return Workload(
        "sample_and_score",
        f"{kind} B={B} V={V}",
        dtype,
        make,
        bytes=B * V * torch.finfo(dtype).bits // 8,
        quick=quick,
    )
