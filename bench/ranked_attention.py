"""Ranked attention: prefill under causal, block-causal and bidirectional ranks."""

from collections.abc import Iterator
from typing import Any

import torch

from pydecode import ranks

from .workload import Inputs, Workload

D = 128
BLOCK = 32


def workloads() -> Iterator[Workload]:
    for kind in ("causal", "block_causal", "bidirectional"):
        for B, N in ((1, 1024), (1, 4096), (8, 4096), (1, 16384)):
            quick = N == 1024 and kind != "bidirectional"
            yield workload(kind, B, N, 32, 8, torch.bfloat16, quick=quick)


def workload(
    kind: str,
    B: int,
    N: int,
    Hq: int,
    Hkv: int,
    dtype: torch.dtype,
    *,
    quick: bool = False,
    head: int = D,
    cache: torch.dtype | None = None,
    masked: bool = False,
    odd: bool = False,
) -> Workload:
    """``cache``: the dtype of keys and values; ``masked``: the ranks said once more by a mask;
    ``odd``: strides of q that 16 does not divide."""
    rank = rank_of(kind, N)
    pairs = B * int(torch.searchsorted(rank[0], rank[0], right=True).sum())
    width, width_k = dtype.itemsize, (cache or dtype).itemsize
    name = f"{kind} B={B} N={N} heads={Hq}/{Hkv} D={head}"
    name += f" cache={str(cache).removeprefix('torch.')}" * bool(cache) + " mask" * masked
    name += " odd" * odd
    return Workload(
        "ranked_attention",
        name,
        dtype,
        lambda device: make(kind, B, N, Hq, Hkv, dtype, device, head, cache or dtype, masked, odd),
        bytes=B * N * head * 2 * (width * Hq + width_k * Hkv) + N * N * masked,
        flops=4 * pairs * Hq * head,
        quick=quick,
    )


def rank_of(kind: str, N: int) -> torch.Tensor:
    if kind == "causal":
        return ranks.causal(N)
    return ranks.block_causal(N, BLOCK) if kind == "block_causal" else torch.zeros(1, N).int()


def make(
    kind: str,
    B: int,
    N: int,
    Hq: int,
    Hkv: int,
    dtype: torch.dtype,
    device: torch.device,
    head: int,
    cache: torch.dtype,
    masked: bool,
    odd: bool = False,
) -> Inputs:
    q = torch.randn(B, N, Hq, head + odd, dtype=dtype, device=device)[..., :head]
    k, v = (torch.randn(B, N, Hkv, head, device=device).to(cache) for _ in range(2))
    rank = rank_of(kind, N).to(device)
    ranked: dict[str, Any] = dict(q_rank=rank, k_rank=rank)
    if masked:
        ranked["mask"] = rank[:, None, :] <= rank[:, :, None]
    return (q, k, v), ranked


# ---- for bench/tune.py --------------------------------------------------------------------------


def tuned_by(key: tuple[Any, ...], arch: str | None = None) -> Workload | None:
    """The workload that selects a key of the kernels' table; None: another device's key."""
    from pydecode.triton_kernels import ranked_attention as kernels

    if arch is None:
        if not torch.cuda.is_available():
            return None
        arch = kernels.architecture(torch.empty(0, device="cuda"))
    table = kernels.CONFIGURATIONS
    mine = [k for k in table if k[0] != "plan" and k[3] == arch]
    if key[0] == "plan":  # an entry with these tiles
        mine = [k for k in mine if (table[k]["BM"], table[k]["BN"]) == key[1:3]]
    elif key not in mine:
        return None
    else:
        mine = [key]
    if not mine:
        return None
    kind, rows, head, _ = mine[0]
    largest = rows == max(k[1] for k in table if (k[0], *k[2:]) == (kind, head, arch))
    dtype = torch.float32 if kind == "single" else torch.bfloat16
    N = 4096 if largest else rows
    return workload(
        *("causal", 2, N, 32, 8, dtype),
        head=head,
        cache=torch.float8_e4m3fn if kind == "bytes" else None,
        masked=key[0] == "plan" and bool(key[3]),
        odd=kind == "odd",
    )
