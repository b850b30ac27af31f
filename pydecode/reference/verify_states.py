"""Hierarchical verification of drafted states of a block: SSD (exact), FreeDave (subset)."""

import torch
from torch import Tensor


def verify_states(
    states: Tensor, targets: Tensor, mask_id: int, rule: str, graph: Tensor | None
) -> Tensor:
    """states, targets [B, K, L], graph bool [B|1, K, K] -> best int64 [B]."""
    B, K, L = states.shape
    node = torch.arange(K, device=states.device)
    if graph is None:
        graph = (node > node[:, None])[None]
    graph = graph.expand(B, K, K)
    best = torch.zeros(B, 1, dtype=torch.int64, device=states.device)
    fresh = (node > 0).expand(B, K)  # states where the walk has not been: cycles end it
    for _ in range(K - 1):
        successor = targets.gather(1, best[..., None].expand(B, 1, L))
        agrees = states == successor
        if rule == "subset":
            agrees = agrees | (states == mask_id)
        edge = graph.gather(1, best[..., None].expand(B, 1, K))[:, 0]
        child = agrees.all(-1) & edge & fresh
        if rule == "subset":
            step = torch.where(child, node, -1).amax(1, keepdim=True)
        else:
            step = torch.where(child, node, K).amin(1, keepdim=True)
        best = torch.where(child.any(1, keepdim=True), step, best)
        fresh = fresh & (node != best)
    return best[:, 0]
