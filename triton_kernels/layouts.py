"""How tensors lie in memory, as far as the attention kernels ask."""

import torch
from torch import Tensor

FORMS = {torch.float8_e4m3fn: 1, torch.float8_e5m2: 2}
"""Bytes of an fp8 cache, see ``numerics.decoded``."""


def odd(x: Tensor) -> bool:
    """Whether x is read by single elements: Triton asks 16 bytes of its address and 16 elements
    of its strides."""
    at = x.storage_offset() * x.itemsize if x.is_meta else x.data_ptr()
    return at % 16 != 0 or any(s % 16 for s in x.stride()[:-1])


def dense(x: Tensor | None) -> Tensor | None:
    """With its last dimension contiguous, which is all that the kernels read; the rest is free."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
