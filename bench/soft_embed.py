"""Soft embeddings at masks: a top-p expectation of the embedding table."""

from collections.abc import Iterator

import torch

from .workload import Inputs, Workload


def workloads() -> Iterator[Workload]:
    for rows in (32, 256):
        yield workload(rows, 126464, 4096, torch.bfloat16, quick=rows == 32)


def workload(rows: int, V: int, E: int, dtype: torch.dtype, *, quick: bool = False) -> Workload:
    def make(device: torch.device) -> Inputs:
        logits = torch.randn(1, rows, V, dtype=dtype, device=device) * 3
        embedding = torch.randn(V, E, dtype=dtype, device=device)
        return (logits, embedding), dict(mask_id=V - 1, top_p=0.9, ratio=0.5)

    width = torch.finfo(dtype).bits // 8
    return Workload(
        "soft_embed",
        f"rows={rows} V={V} E={E}",
        dtype,
        make,
        bytes=width * (rows * V + V * E + rows * E),
        flops=2 * rows * V * E,
        quick=quick,
    )
