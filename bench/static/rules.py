"""What a kernel's binary must hold, told by the hardware's manual before anything is compiled.

Nothing here may be copied from what a compiler gave: a rule that follows the binary proves nothing.
"""

from typing import NamedTuple

import torch

from .binary import Binary
from .targets import Target

HALVES = (torch.float16, torch.bfloat16)


class Expected(NamedTuple):
    matrix: str | None  # the one family of matrix instructions; None: there must be none
    asynchronous: bool  # copies from global to shared memory that no register waits for
    wide_loads: int  # loads of 16 bytes and more, at least

    def __str__(self) -> str:
        words = [self.matrix or "no matrix instruction"]
        words += ["asynchronous copies"] * self.asynchronous
        words += [f"{self.wide_loads} loads of 16 bytes"] * bool(self.wide_loads)
        return ", ".join(words)


def expected(
    dtype: torch.dtype,
    m: int | None,
    target: Target,
    *,
    stages: int = 1,
    streamed: int = 0,
    aligned: bool = True,
    threads: int = 128,
) -> Expected:
    """The rule, of dtype, M and architecture.

    Matrix: fp32 is IEEE, so NVIDIA's matrix units (TF32) must stay out, while CDNA's have fp32.
    Halves: mma.sync (HMMA) everywhere, wgmma (HGMMA) on sm_90 and tcgen05 (UTCHMMA) on sm_100
    from M = 64 on, which is the least that both of them multiply.
    Asynchronous copies move 4, 8 or 16 bytes, on NVIDIA from sm_80 on.
    Loads: ``streamed`` bytes by ``threads`` threads at 16 bytes each; a dot needs at least one.
    """
    width = 16 if aligned else dtype.itemsize
    asynchronous = target.backend == "cuda" and stages > 1 and width >= 4
    wide = -(-streamed // (16 * threads)) or (m is not None)
    return Expected(_matrix(dtype, m, target), asynchronous, int(wide) if aligned else 0)


def _matrix(dtype: torch.dtype, m: int | None, target: Target) -> str | None:
    if m is None:
        return None
    if dtype not in (*HALVES, torch.float32):
        raise ValueError(f"dtype: there is no rule for dots of {dtype}: write it into rules.py")
    if target.backend == "hip":
        return "MFMA"
    if dtype == torch.float32:
        return None
    if m >= 64 and target.name in ("sm_90", "sm_100"):
        return {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}[target.name]
    return "HMMA"


def faults(want: Expected, has: Binary, target: Target) -> list[str]:
    """Where the binary disagrees with the rule, or takes what the target does not have."""
    found = []
    if has.stack or has.spills:
        found.append(f"spills {has.spills} bytes, stack {has.stack} bytes")
    if has.shared > target.shared:
        found.append(
            f"{has.shared / 1024:.1f} KB of shared memory, {target.name} has "
            f"{target.shared // 1024} KB a block"
        )
    if has.tensor_memory > 512:
        found.append(f"{has.tensor_memory} columns of tensor memory, 512 exist")
    if not found and has.blocks < 1:
        found.append("not one block fits an SM")
    families = set(has.matrix)
    if families != ({want.matrix} if want.matrix else set()):
        seen = ", ".join(sorted(families)) or "no matrix instruction"
        found.append(f"expected {want.matrix or 'no matrix instruction'}, has {seen}")
    if want.asynchronous and not has.asynchronous:
        found.append("no asynchronous copy")
    bulk = any(name in has.asynchronous for name in ("UTMALDG", "UBLKCP"))
    wide = sum(n for width, n in has.loads.items() if width >= 16)
    if wide < want.wide_loads and not bulk:
        found.append(f"{wide} loads of 16 bytes, expected {want.wide_loads}")
    return found
