"""Rejection sampling of chains: CEILINGS table 3.4, target and draft logits read once."""

from collections.abc import Iterator

import torch

from .workload import Inputs, Workload

V = 128256


def workloads() -> Iterator[Workload]:
    for G in (4, 8):
        for B in (1, 4, 16, 64, 128, 256):
            yield workload(B, G, "token", torch.bfloat16, quick=G == 4 and B in (1, 16))
    for B in (1, 16, 64):
        yield workload(B, 4, "block", torch.bfloat16)


def workload(
    B: int, G: int, rule: str, dtype: torch.dtype, *, V: int = V, quick: bool = False
) -> Workload:
    return Workload(
        "rejection_sample",
        f"{rule} B={B} G={G} V={V}",
        dtype,
        lambda device: make(B, G, V, rule, dtype, device),
        bytes=(2 * G + 1) * B * V * torch.finfo(dtype).bits // 8,
        quick=quick,
    )


def make(B: int, G: int, V: int, rule: str, dtype: torch.dtype, device: torch.device) -> Inputs:
    """A draft law near the target's, so that about 7 drafts in 10 are accepted."""
    target = torch.randn(B, G + 1, V, dtype=dtype, device=device) * 3
    draft = target[:, :G] + torch.randn(B, G, V, dtype=dtype, device=device) * 0.8
    tokens = draft.float().softmax(-1).view(-1, V).multinomial(1).view(B, G)
    return (target, tokens, draft), dict(rule=rule, seed=torch.arange(B, device=device))
