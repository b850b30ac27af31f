"""Rejection sampling of draft trees under each rule."""

from collections.abc import Iterator

import torch

from .tree_attention import random_tree
from .workload import Inputs, Workload

V = 128256
SAMPLED = ("recursive", "without_replacement", "k_seq", "traversal")


def workloads() -> Iterator[Workload]:
    for rule in (*SAMPLED, "target_only"):
        for B, T in ((1, 16), (16, 16), (16, 64)):
            yield workload(B, T, rule, torch.bfloat16, quick=(B, T) == (1, 16))


def workload(
    B: int, T: int, rule: str, dtype: torch.dtype, *, V: int = V, quick: bool = False
) -> Workload:
    laws = 1 if rule == "target_only" else 2
    return Workload(
        "rejection_sample_tree",
        f"{rule} B={B} T={T} V={V}",
        dtype,
        lambda device: make(B, T, V, rule, dtype, device),
        bytes=laws * B * T * V * torch.finfo(dtype).bits // 8,
        quick=quick,
    )


def make(B: int, T: int, V: int, rule: str, dtype: torch.dtype, device: torch.device) -> Inputs:
    target = torch.randn(B, T, V, dtype=dtype, device=device) * 3
    parents = random_tree(T).expand(B, T).contiguous().to(device)
    tokens = torch.randint(V, (B, T), device=device)
    tokens[:, 1:] = target.argmax(-1)[:, parents[0, 1:].clamp(min=0)]  # drafts worth a walk
    kwargs = dict(rule=rule, seed=torch.arange(B, device=device))
    if rule != "target_only":
        kwargs["draft_logits"] = target + torch.randn_like(target) * 0.8
    return (target, tokens, parents), kwargs
