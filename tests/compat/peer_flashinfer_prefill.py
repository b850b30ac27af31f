"""FlashInfer's paged prefill as it is documented, in loops; and random batches for it."""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

Mask = list[list[list[bool]]]  # [request][row][key]


class Batch(NamedTuple):
    """Page lists, and a pool of K and V, [pages, page_size, Hkv, D | Dv]."""

    qo_indptr: Tensor
    kv_indptr: Tensor
    indices: Tensor
    last_page_len: Tensor
    page_size: int
    k: Tensor
    v: Tensor
    q: Tensor

    @property
    def lists(self) -> tuple[Tensor, ...]:
        return self[:4]

    @property
    def rows(self) -> list[int]:
        return [b - a for a, b in pairwise(self.qo_indptr.tolist())]

    @property
    def keys(self) -> list[int]:
        pages = [b - a for a, b in pairwise(self.kv_indptr.tolist())]
        last = self.last_page_len.tolist()
        return [(n - 1) * self.page_size + m if n else 0 for n, m in zip(pages, last)]


def random_batch(
    rows: list[int],
    keys: list[int],
    *,
    page_size: int = 3,
    Hq: int = 2,
    Hkv: int = 1,
    D: int = 8,
    Dv: int = 8,
    dtype: torch.dtype = torch.float64,
    spare: int = 0,
) -> Batch:
    """Random pages for these lengths; ``spare`` page ids follow that belong to nobody."""
    pages = [-(-n // page_size) for n in keys]
    pool = sum(pages) + spare + 2
    last = [n - (p - 1) * page_size if p else 1 for n, p in zip(keys, pages)]
    return Batch(
        torch.tensor([0, *rows]).cumsum(0).int(),
        torch.tensor([0, *pages]).cumsum(0).int(),
        torch.randperm(pool)[: sum(pages) + spare].int(),
        torch.tensor(last).int(),
        page_size,
        torch.randn(pool, page_size, Hkv, D).to(dtype),
        torch.randn(pool, page_size, Hkv, Dv).to(dtype),
        torch.randn(sum(rows), Hq, D).to(dtype),
    )


def random_tree_mask(rows: int, keys: int) -> list[list[bool]]:
    """All keys before the rows in flight, and among these whatever comes."""
    prefix = max(keys - rows, 0)
    among = (torch.rand(rows, keys - prefix) < 0.6).tolist()
    return [[True] * prefix + row for row in among]


def flat(mask: Mask) -> Tensor:
    """As FlashInfer takes it: request by request, row by row."""
    return torch.tensor([x for request in mask for row in request for x in row], dtype=torch.bool)


def packed(mask: Mask) -> Tensor:
    """As its ``segment_packbits(..., "little")`` gives it: each request from a new byte on."""
    result: list[int] = []
    for request in mask:
        bits = [x for row in request for x in row]
        for start in range(0, len(bits), 8):
            result.append(sum(x << p for p, x in enumerate(bits[start : start + 8])))
    return torch.tensor(result, dtype=torch.uint8)


def oracle(
    batch: Batch,
    *,
    mask: Mask | None = None,
    causal: bool = False,
    window_left: int = -1,
    soft_cap: float = 0.0,
    scale: float | None = None,
    sinks: Tensor | None = None,
    only: Any = None,
) -> tuple[Tensor, Tensor]:
    """out [total, Hq, Dv], lse [total, Hq] to the base 2, fp64; of the rows ``only``, if given."""
    q, k, v = batch.q.double(), batch.k.double(), batch.v.double()
    total, Hq, D = q.shape
    out = torch.zeros(total, Hq, v.shape[-1], dtype=torch.float64)
    lse = torch.full((total, Hq), -torch.inf, dtype=torch.float64)
    scale = 1 / math.sqrt(D) if scale is None else scale
    for b, (Q, K) in enumerate(zip(batch.rows, batch.keys)):
        first_page, first_row = int(batch.kv_indptr[b]), int(batch.qo_indptr[b])
        for i in range(Q):
            if only is not None and first_row + i not in only:
                continue
            seen = []
            for j in range(K):
                sees = mask[b][i][j] if mask is not None else not causal or j + Q <= K + i
                if sees and (window_left < 0 or j + Q + window_left >= K + i):
                    page = int(batch.indices[first_page + j // batch.page_size])
                    seen.append((page, j % batch.page_size))
            pages, offsets = [p for p, _ in seen], [o for _, o in seen]
            for h in range(Hq):
                g = h // (Hq // k.shape[2])
                s = scale * k[pages, offsets, g] @ q[first_row + i, h]
                s = soft_cap * torch.tanh(s / soft_cap) if soft_cap else s
                s = s if sinks is None else torch.cat([s, sinks[h].double()[None]])
                if len(s):
                    lse[first_row + i, h] = s.logsumexp(0) / math.log(2)
                out[first_row + i, h] = s.softmax(0)[: len(seen)] @ v[pages, offsets, g]
    return out, lse
