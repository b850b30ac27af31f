"""Which of the tables' architectures a tensor lies on, and launching there."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")
"""Keys of the tables. sm_86 stands for the cards with 99 KB of shared memory: sm_89, sm_120."""
ON_CPU = "sm_90"  # whose table the interpreter runs
_HERE = nullcontext()
_known: dict[int, str] = {}


def table_of(target: str) -> str:
    """The table that a target of the static report reads."""
    return "sm_86" if target in ("sm_89", "sm_120") else target


def architecture(x: Tensor) -> str:
    """The table that x's device reads."""
    if not x.is_cuda:
        return ON_CPU
    index = x.get_device()
    found = _known.get(index)
    return found if found is not None else _known.setdefault(index, _architecture(index))


def _architecture(index: int) -> str:
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(index)
    if major == 8:
        return "sm_80" if minor == 0 else "sm_86"
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_86")


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be x's."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)
