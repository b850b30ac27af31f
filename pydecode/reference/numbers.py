"""Reads the schema's (number, tensor) pairs, and says in which dtype the references compute."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_at_input_dtype: ContextVar[bool] = ContextVar("at_input_dtype", default=False)


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
    if not torch.compiler.is_compiling() and _at_input_dtype.get():  # Dynamo reads no ContextVar
        return dtype
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def at_input_dtype() -> Iterator[None]:
    """Inside, references compute in the dtype of their inputs, as plain PyTorch would.

    What a kernel's error is held against: the same formula, without our wider accumulation.
    """
    token = _at_input_dtype.set(True)
    try:
        yield
    finally:
        _at_input_dtype.reset(token)
