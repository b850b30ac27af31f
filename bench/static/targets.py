"""The architectures that kernels are compiled for, and what one block may take of them."""

from typing import NamedTuple


class Target(NamedTuple):
    name: str
    backend: str  # as Triton names it
    arch: int | str
    shared: int  # bytes of shared memory that one block may take
    shared_of_sm: int  # and that all blocks of an SM share
    warps: int  # resident in an SM
    blocks: int

    @property
    def warp_size(self) -> int:
        return 32 if self.backend == "cuda" else 64

    @property
    def nvcc(self) -> str:
        """What nvcc calls it; the instructions of wgmma exist in sm_90a alone."""
        return "sm_90a" if self.name == "sm_90" else self.name


_KB = 1024

TARGETS = {
    t.name: t
    for t in (
        Target("sm_80", "cuda", 80, 163 * _KB, 164 * _KB, 64, 32),
        Target("sm_86", "cuda", 86, 99 * _KB, 100 * _KB, 48, 16),
        Target("sm_89", "cuda", 89, 99 * _KB, 100 * _KB, 48, 24),
        Target("sm_90", "cuda", 90, 227 * _KB, 228 * _KB, 64, 32),
        Target("sm_100", "cuda", 100, 227 * _KB, 228 * _KB, 64, 32),
        Target("sm_120", "cuda", 120, 99 * _KB, 100 * _KB, 48, 24),
        Target("gfx942", "hip", "gfx942", 64 * _KB, 64 * _KB, 32, 16),
    )
}
CUDA_TARGETS = ("sm_80", "sm_90", "sm_100")
"""What csrc/ is compiled for."""


def blocks_per_sm(
    target: Target, registers: int, shared: int, warps: int, tensor_memory: int = 0
) -> int:
    """Blocks that are resident at once, by registers, shared memory, warps and slots."""
    if target.backend == "cuda":
        # four quarters of 16384 registers, handed out by 256 to a warp; 1 KB reserved a block
        by_registers = 4 * (16384 // (_up(registers * 32, 256) or 1)) // warps
        by_shared = target.shared_of_sm // _up(shared + _KB, 128)
    else:
        # four SIMDs of 512 registers a lane, handed out by 8; at most 8 waves each
        by_registers = 4 * min(8, 512 // (_up(registers, 8) or 1)) // warps
        by_shared = target.shared_of_sm // shared if shared else target.blocks
    by_columns = 512 // tensor_memory if tensor_memory else target.blocks
    return min(by_registers, by_shared, by_columns, target.warps // warps, target.blocks)


def _up(value: int, step: int) -> int:
    return -(-value // step) * step
