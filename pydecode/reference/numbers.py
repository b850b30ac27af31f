"""Reads the schema's (number, tensor) pairs."""

import torch
from torch import Tensor


def per_request(
    number: float | int,
    tensor: Tensor | None,
    batch: int,
    like: Tensor | torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """The pair as one value a request, [B], on a device or the device of ``like``."""
    if tensor is None:
        device = like if isinstance(like, torch.device) else like.device
        return torch.full((batch,), number, dtype=dtype, device=device)
    return tensor.to(dtype).expand(batch)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of accumulations: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
