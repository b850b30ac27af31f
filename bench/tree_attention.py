"""Tree attention: CEILINGS table 3.1, a tree of 64 nodes over a paged context."""

from collections.abc import Iterator

import torch

from pydecode import trees

from .workload import Inputs, Workload

PAGE = 16


def workloads() -> Iterator[Workload]:
    for dtype in (torch.bfloat16,):
        for B, context in [
            *((1, c) for c in (2048, 8192, 32768, 131072)),
            *((8, c) for c in (2048, 8192, 32768, 131072)),
            *((32, c) for c in (2048, 8192, 32768)),
            *((64, c) for c in (2048, 8192, 32768)),
        ]:
            yield workload(B, context, 64, dtype, quick=context == 2048 and B in (1, 8))
        yield workload(1, 8192, 8, dtype, quick=True)  # a small tree: bandwidth alone
        yield workload(32, 8192, 8, dtype)


def workload(
    B: int,
    context: int,
    nodes: int,
    dtype: torch.dtype,
    *,
    heads: tuple[int, int] = (32, 8),
    D: int = 128,
    quick: bool = False,
) -> Workload:
    Hq, Hkv = heads
    keys = context + nodes
    rows = B * nodes
    width = torch.finfo(dtype).bits // 8
    return Workload(
        "tree_attention",
        f"B={B} context={context} nodes={nodes} heads={Hq}/{Hkv} D={D}",
        dtype,
        lambda device: make(B, context, nodes, Hq, Hkv, D, dtype, device),
        bytes=width * (2 * B * keys * Hkv * D + 2 * rows * Hq * D),
        flops=4 * rows * Hq * D * keys,
        quick=quick,
    )


def make(
    B: int,
    context: int,
    nodes: int,
    Hq: int,
    Hkv: int,
    D: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Inputs:
    """A shuffled page table, one random tree a request, K/V of the nodes beside the cache."""
    width = -(-context // PAGE)
    table = torch.randperm(B * width, device=device).view(B, width).int()
    k_cache, v_cache = (
        torch.randn(B * width, PAGE, Hkv, D, dtype=dtype, device=device) for _ in range(2)
    )
    q = torch.randn(B, nodes, Hq, D, dtype=dtype, device=device)
    k, v = (torch.randn(B, nodes, Hkv, D, dtype=dtype, device=device) for _ in range(2))
    parents = torch.stack([random_tree(nodes) for _ in range(B)]).to(device)
    lengths = torch.full((B,), context, dtype=torch.int32, device=device)
    mask = trees.mask_from_parents(parents)
    kwargs = dict(mask=mask, cache_seqlens=lengths, block_table=table)
    return (q, k_cache, v_cache, k, v), kwargs


def random_tree(nodes: int) -> torch.Tensor:
    """Parents of a tree in which every node hangs below one of the eight before it."""
    i = torch.arange(nodes)
    parents = i - 1 - (torch.rand(nodes) * i.clamp(max=8)).long()
    return parents.clamp(min=0).index_fill(0, torch.zeros(1).long(), -1)
