"""The two samplers that diffusion engines really run, in our own words.

LLaDA (``generate.py``): float64 softmax, gather, then the k most confident masked positions; here
with a threshold, as Fast-dLLM has it. dInfer (``parallel_strategy.py``): fp32 softmax, the argmax,
and every position whose probability reaches min(threshold, the largest less 1e-5).
"""

import torch
from torch import Tensor


def llada(logits: Tensor, tokens: Tensor, mask_id: int, threshold: float) -> Tensor:
    """float64 softmax of every row; the surest masked one, and all above the threshold."""
    choice = logits.argmax(-1)
    p = logits.to(torch.float64).softmax(-1).gather(-1, choice[..., None])[..., 0]
    masked = tokens == mask_id
    p = torch.where(masked, p, -torch.inf)
    best = torch.zeros_like(masked).scatter_(-1, p.topk(1).indices, True)
    return torch.where(masked & (best | (p >= threshold)), choice, tokens)


def dinfer(logits: Tensor, tokens: Tensor, mask_id: int, threshold: float) -> Tensor:
    """fp32 softmax of every row; all that reach the threshold, which the surest one lowers."""
    p, choice = logits.float().softmax(-1).max(-1)
    masked = (tokens == mask_id) & (choice != mask_id)
    p = torch.where(masked, p, -torch.inf)
    reach = (p.amax(-1, keepdim=True) - 1e-5).clamp(max=threshold)
    return torch.where(masked & (p >= reach), choice, tokens)
