"""APD's test: the drafting noise is made again for both laws."""

from collections.abc import Iterator

import torch

from .workload import Inputs, Workload


def workloads() -> Iterator[Workload]:
    for B in (1, 16):
        yield workload(B, 8, 151936, torch.bfloat16, quick=B == 1)


def workload(B: int, M: int, V: int, dtype: torch.dtype, *, quick: bool = False) -> Workload:
    def make(device: torch.device) -> Inputs:
        draft, verifier = (torch.randn(B, M, V, dtype=dtype, device=device) * 3 for _ in range(2))
        tokens = draft.argmax(-1)
        seed = torch.arange(B, device=device)
        return (draft, verifier, tokens), dict(ratio=0.5, temperature=0.8, seed=seed)

    width = torch.finfo(dtype).bits // 8
    label = f"B={B} M={M} V={V}"
    return Workload("coupled_accept", label, dtype, make, bytes=2 * B * M * V * width, quick=quick)
