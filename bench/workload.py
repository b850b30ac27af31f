"""What is timed: one shape of one op, what it must move and multiply, and its inputs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class Workload(NamedTuple):
    """One shape of one op.

    ``bytes`` and ``flops`` are what the op cannot do without (each input read once, each output
    written once), whatever a backend really does.
    """

    op: str
    label: str  # the shape, as the tables of docs/performance.md have it
    dtype: torch.dtype
    make: Callable[[torch.device], Inputs]  # fresh inputs for the public function
    bytes: int
    flops: int = 0
    quick: bool = False  # one of the few that ``--quick`` runs

    @property
    def key(self) -> str:
        """Names the row in result files."""
        return f"{self.op} {self.label} {str(self.dtype).removeprefix('torch.')}"
