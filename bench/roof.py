"""What the machine itself can do, measured in the run whose figures are held against it."""

from typing import NamedTuple

import torch

from .timing import race

GIGA = 1e9


class Roof(NamedTuple):
    """Bytes a second (a copy's reads and writes; on a CPU, reads) and products a second a dtype."""

    bandwidth: float
    flops: dict[torch.dtype, float]

    def floor(self, bytes_moved: int, flops: int, dtype: torch.dtype) -> float:
        """The least time in microseconds: whatever takes longer, moving or multiplying."""
        rate = self.flops.get(dtype)
        multiplying = flops / rate if flops and rate else 0.0
        return max(bytes_moved / self.bandwidth, multiplying) * 1e6


def measure(device: torch.device, dtypes: set[torch.dtype]) -> Roof:
    """The roof of a device; a few seconds."""
    if device.type == "cuda":
        x = torch.empty(2**28, dtype=torch.float32, device=device).normal_()
        y = torch.empty_like(x)
        took = race({"copy": lambda _: y.copy_(x)}, sets=1, device=device, rounds=30)
        bandwidth = 2 * x.numel() * 4 / (took.spread("copy").p20 * 1e-6)
        del x, y
        side = 8192
    else:
        x = torch.ones(2**25, dtype=torch.float32)  # 128 MB, past the caches
        took = race({"read": lambda _: x.sum()}, sets=1, device=device, rounds=15)
        bandwidth = x.numel() * 4 / (took.spread("read").p20 * 1e-6)
        del x
        side = 1024
    return Roof(bandwidth, {d: _matrix_rate(device, d, side) for d in dtypes})


def _matrix_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    took = race({"matmul": lambda _: a @ b}, sets=1, device=device, rounds=20, seconds=1.0)
    return 2 * side**3 / (took.spread("matmul").p20 * 1e-6)
