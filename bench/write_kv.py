"""Writing K/V: RoPE of q and k, and the scatter into a paged cache."""

from collections.abc import Iterator

import torch

from .workload import Inputs, Workload

PAGE, Hq, Hkv, D = 16, 32, 8, 128


def workloads() -> Iterator[Workload]:
    for B, N in ((1, 64), (64, 64), (1, 4096)):
        yield workload(B, N, torch.bfloat16, quick=(B, N) == (1, 64))


def workload(B: int, N: int, dtype: torch.dtype, *, quick: bool = False) -> Workload:
    pages = -(-N // PAGE) + 1

    def make(device: torch.device) -> Inputs:
        k_cache, v_cache = torch.zeros(
            2, B * pages, PAGE, Hkv, D, dtype=dtype, device=device
        ).unbind(0)
        k, v = torch.randn(2, B, N, Hkv, D, dtype=dtype, device=device).unbind(0)
        q = torch.randn(B, N, Hq, D, dtype=dtype, device=device)
        positions = (torch.arange(N, device=device) + 7).expand(B, N).contiguous()
        angle = torch.rand(B, N, D // 2, device=device) * 100
        table = torch.randperm(B * pages, device=device).view(B, pages).int()
        kwargs = dict(positions=positions, block_table=table, cos=angle.cos(), sin=angle.sin(), q=q)
        return (k, v, k_cache, v_cache), kwargs

    width = torch.finfo(dtype).bits // 8
    moved = B * N * (2 * width * D * (Hq + 2 * Hkv) + 4 * D)
    label = f"B={B} N={N} heads={Hq}/{Hkv} D={D}"
    return Workload("write_kv", label, dtype, make, bytes=moved, quick=quick)
