"""Crediting the favourites of a block's rows: a few entries a row, read and written."""

from collections.abc import Iterator

import torch

from .workload import Inputs, Workload

L = 32


def workloads() -> Iterator[Workload]:
    for B in (1, 64):
        yield workload(B, L, quick=B == 1)


def workload(B: int, S: int, *, quick: bool = False) -> Workload:
    def make(device: torch.device) -> Inputs:
        ids = torch.arange(S, device=device).repeat(B, L, 1)
        ids[..., S // 2 :] = -1
        credit = torch.rand(B, L, S, device=device) * (ids >= 0)
        tokens = torch.randint(S, (B, L), device=device)
        return (ids, credit, tokens, torch.rand(B, L, device=device)), {}

    # ids and credit read and written, and the bias; a token and its confidence a row
    moved = B * L * (S * (2 * 8 + 3 * 4) + 8 + 4)
    label = f"B={B} L={L} S={S}"
    return Workload("earn_credit", label, torch.float32, make, bytes=moved, quick=quick)
