"""Merging attention states: parts of the context that were attended to apart, as one softmax.

out = sum_m softmax(l)_m out_m, lse = logsumexp(l), l_m = scales_m temperatures_m lse_m. With both 1
it is exact (FlashAttention, Dao et al., NeurIPS 2022, section 3.1; FlashInfer, Ye et al., MLSys
2025, section 2.2); APE (Yang et al., ICLR 2025) has both below 1 for parallel contexts.
"""

import math

import torch
from torch import Tensor

from .numbers import compute_dtype


def merge_states(
    outs: list[Tensor],
    lses: list[Tensor],
    temperatures: Tensor | None,
    scales: Tensor | None,
    mask: Tensor | None,
    log_base: float,
) -> tuple[Tensor, Tensor]:
    """outs M of [..., N, H, D], lses M of [..., H, N] -> out [..., N, H, D], lse [..., H, N].

    mask [..., N]: rows where it is False are those of part 0.
    """
    dtype = compute_dtype(outs[0].dtype)
    natural = math.log(log_base)  # log_base^x = exp(natural x); 1 for e
    weight = torch.full((len(outs),), natural, dtype=dtype, device=outs[0].device)
    for factor in (temperatures, scales):
        if factor is not None:
            weight = weight * factor.to(dtype)
    # -inf is "saw nothing" whatever it is weighed by: 0 * -inf and -1 * -inf must not be heard
    empty = [lse == -torch.inf for lse in lses]
    l = [torch.where(empty[m], -torch.inf, weight[m] * lse.to(dtype)) for m, lse in enumerate(lses)]

    top = l[0]
    for l_m in l[1:]:
        top = torch.maximum(top, l_m)
    base = torch.where(top == -torch.inf, 0.0, top)
    total = torch.zeros_like(top)
    out = torch.zeros_like(outs[0], dtype=dtype, memory_format=torch.contiguous_format)
    for m, out_m in enumerate(outs):
        p = torch.exp(l[m] - base)
        total = total + p
        part = p.transpose(-1, -2)[..., None] * out_m.to(dtype)
        out = out + torch.where(empty[m].transpose(-1, -2)[..., None], 0.0, part)
    share = total.transpose(-1, -2)[..., None]
    out = torch.where(share == 0, 0.0, out / share)
    lse = (base + torch.log(total)) / natural
    out = out.to(outs[0].dtype)
    if mask is not None:
        out = torch.where(mask[..., None, None], out, outs[0])
        lse = torch.where(mask.unsqueeze(-2), lse, lses[0])
    return out.contiguous(), lse.contiguous()
