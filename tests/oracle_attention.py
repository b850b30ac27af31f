"""What the attention ops must return, as plain loops over rows and keys in fp64.

Written from the words of the contract, sharing no code with the package. Each oracle takes the
public function's arguments. It notes in ``seen`` which entries some query sees, so that tests can
poison all others; with a low ``dtype`` it is the plain formula in that dtype, whose error is the
yardstick of the tolerance.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import pydecode

PAD = 2**31 - 1
Index = tuple[int, ...]
Source = tuple[Tensor, Tensor, Any, Any]  # k, v and their scales


def per_request(value: Any, b: int, default: int) -> int:
    if value is None:
        return default
    if isinstance(value, Tensor):
        return int(value if value.dim() == 0 else value[b])
    return int(value)


def scale_of(scale: Any, b: int) -> Any:
    if isinstance(scale, Tensor) and scale.dim():
        return (scale[b] if scale.dim() == 2 else scale).double()[:, None]
    return 1.0 if scale is None else float(scale)


def solve(
    q: Tensor,
    sources: dict[str, Source],
    rows: list[tuple[int, int, Index]],
    visible: Callable[[int, int], list[tuple[str, Index]]],
    *,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    seen: set[tuple[str, Index]] | None = None,
) -> tuple[Tensor, Tensor]:
    """One softmax a row: rows are (request, row, index in q); visible names the keys it sees."""
    Hq, D = q.shape[-2:]
    k_any, v_any = next(iter(sources.values()))[:2]
    group = Hq // k_any.shape[-2]
    scale = D**-0.5 if softmax_scale is None else softmax_scale
    out = torch.zeros(*q.shape[:-1], v_any.shape[-1], dtype=dtype)
    lse = torch.full(q.shape[:-1], -torch.inf, dtype=dtype)
    for b, i, index in rows:
        keys = visible(b, i)
        if seen is not None:
            seen.update(keys)
            seen.add(("q", index))
        s = torch.zeros(0, Hq, dtype=dtype)
        v = torch.zeros(0, Hq, v_any.shape[-1], dtype=dtype)
        if keys:
            ks = [sources[n][0][at].to(dtype) * scale_of(sources[n][2], b) for n, at in keys]
            vs = [sources[n][1][at].to(dtype) * scale_of(sources[n][3], b) for n, at in keys]
            k = torch.stack(ks).to(dtype).repeat_interleave(group, 1)
            v = torch.stack(vs).to(dtype).repeat_interleave(group, 1)
            s = (q[index].to(dtype) * k).sum(-1) * scale
        if softcap > 0:
            s = softcap * torch.tanh(s / softcap)
        if sinks is not None:  # a key of its own, whose value is 0
            s = torch.cat([s, sinks.to(dtype)[None]])
            v = torch.cat([v, torch.zeros(1, *v.shape[1:], dtype=dtype)])
        if len(s):
            lse[index] = torch.logsumexp(s, 0)
            out[index] = (torch.softmax(s, 0)[..., None] * v).sum(0)
    return out, lse.transpose(-1, -2)


def slot_of(cache: Tensor, table: Tensor | None, b: int, p: int) -> Index | None:
    """Where request b's cached position p lies; None: nowhere."""
    if table is None:
        return (b, p) if 0 <= p < cache.shape[1] else None
    page_size = cache.shape[1]
    if p < 0 or p >= table.shape[1] * page_size:
        return None
    page = int(table[b, p // page_size])
    return (page, p % page_size) if 0 <= page < cache.shape[0] else None


def rows_of(q: Tensor, num_tokens: Any, cu: Tensor | None) -> list[list[Index]]:
    """The valid rows' indices of each request."""
    if cu is not None:
        bounds = cu.tolist()
        return [[(t,) for t in range(*pair)] for pair in pairwise(bounds)]
    N = q.shape[1]
    return [[(b, i) for i in range(per_request(num_tokens, b, N))] for b in range(q.shape[0])]


def sees_row(mask: Any, b: int, i: int, j: int, index: Index) -> bool:
    if mask is None:
        return True
    if isinstance(mask, str):
        return j <= i
    row = mask[index] if mask.dim() == 2 else mask[b if mask.shape[0] > 1 else 0, i]
    return bool(row[j]) if mask.dtype == torch.bool else bool(int(row[j // 64]) >> (j % 64) & 1)


def in_flight(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    start: Callable[[int], int],
    sees_cached: Callable[[int, int, int], bool],
    sees: Callable[[int, int, int], bool],
    rows: list[list[Index]],
    block_table: Tensor | None,
    k_scale: Any,
    v_scale: Any,
    **numbers: Any,
) -> tuple[Tensor, Tensor]:
    """Rows over a cache and each other."""
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    sources: dict[str, Source] = {"cache": (k_cache, v_cache, k_scale, v_scale)}
    if k is not None and v is not None:
        sources["rows"] = (k, v, None, None)

    def visible(b: int, i: int) -> list[tuple[str, Index]]:
        keys: list[tuple[str, Index]] = []
        for p in range(capacity):
            slot = slot_of(k_cache, block_table, b, p)
            if slot is not None and sees_cached(b, i, p):
                keys.append(("cache", slot))
        for j, index in enumerate(rows[b]):
            if sees(b, i, j):
                own = slot_of(k_cache, block_table, b, start(b) + j) if k is None else index
                if own is not None:
                    keys.append(("cache" if k is None else "rows", own))
        return keys

    flat = [(b, i, index) for b, own in enumerate(rows) for i, index in enumerate(own)]
    return solve(q, sources, flat, visible, **numbers)


def tree_attention(
    *tensors: Any,
    mask: Any = None,
    cache_seqlens: Any = None,
    num_tokens: Any = None,
    positions: Tensor | None = None,
    window_size: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    block_table: Tensor | None = None,
    k_scale: Any = None,
    v_scale: Any = None,
    **numbers: Any,
) -> tuple[Tensor, Tensor]:
    q, k_cache, v_cache, k, v = (*tensors, None, None)[:5]
    rows = rows_of(q, num_tokens, cu_seqlens_q)
    whole = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])

    def start(b: int) -> int:
        return per_request(cache_seqlens, b, whole)

    def sees(b: int, i: int, j: int) -> bool:
        return sees_row(mask, b, i, j, rows[b][i])

    def sees_cached(b: int, i: int, p: int) -> bool:
        if p >= start(b) or window_size is None:
            return p < start(b)
        if positions is not None:
            at = int(positions[rows[b][i]])
        else:
            others = sum(sees(b, i, j) for j in range(len(rows[b])) if j != i)
            at = start(b) + (0 if mask is None else others)
        return p > at - window_size

    return in_flight(
        *(q, k_cache, v_cache, k, v, start, sees_cached, sees, rows),
        *(block_table, k_scale, v_scale),
        **numbers,
    )


def block_attention(
    *tensors: Any,
    mask: Any = None,
    causal: Any = None,
    cache_seqlens: Any = None,
    replace_at: Any = None,
    cache_starts: Any = None,
    num_tokens: Any = None,
    positions: Tensor | None = None,
    window_size: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    block_table: Tensor | None = None,
    k_scale: Any = None,
    v_scale: Any = None,
    **numbers: Any,
) -> tuple[Tensor, Tensor]:
    q, k_cache, v_cache, k, v = (*tensors, None, None)[:5]
    rows = rows_of(q, num_tokens, cu_seqlens_q)
    whole = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])

    def start(b: int) -> int:
        at = per_request(replace_at, b, -1)
        return at if at >= 0 else per_request(cache_seqlens, b, whole)

    def is_causal(b: int) -> bool:
        return bool(per_request(causal, b, 0))

    def sees(b: int, i: int, j: int) -> bool:
        return j <= i if is_causal(b) else sees_row(mask, b, i, j, rows[b][i])

    def sees_cached(b: int, i: int, p: int) -> bool:
        if not per_request(cache_starts, b, 0) <= p < per_request(cache_seqlens, b, whole):
            return False
        if start(b) <= p < start(b) + len(rows[b]):
            return False  # the hole
        if is_causal(b) and p >= start(b):
            return False
        if window_size is None:
            return True
        if p >= start(b):
            return False
        if positions is not None:
            return p > int(positions[rows[b][i]]) - window_size
        return p > start(b) + i - window_size if is_causal(b) else p >= start(b) - window_size

    return in_flight(
        *(q, k_cache, v_cache, k, v, start, sees_cached, sees, rows),
        *(block_table, k_scale, v_scale),
        **numbers,
    )


def branch_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_branches: Any = None,
    num_tokens: Any = None,
    positions: Tensor | None = None,
    seen: set[tuple[str, Index]] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """K calls of the block oracle."""
    B, K, L = q.shape[:3]
    outs, lses = [], []
    for c in range(K):
        counts = [
            per_request(num_tokens, b, L) if c < per_request(num_branches, b, K) else 0
            for b in range(B)
        ]
        at = None if positions is None else positions[:, min(c, positions.shape[1] - 1)]
        own: set[tuple[str, Index]] = set()
        out, lse = block_attention(
            *(q[:, c], k_cache, v_cache, k[:, c], v[:, c]),
            num_tokens=torch.tensor(counts),
            positions=at,
            seen=own,
            **kwargs,
        )
        if seen is not None:
            seen |= {(n, s if n == "cache" else (s[0], c, s[1])) for n, s in own}
        outs.append(out)
        lses.append(lse)
    return torch.stack(outs, 1), torch.stack(lses, 1)


def ranked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_rank: Tensor | None = None,
    k_rank: Tensor | None = None,
    mask: Tensor | None = None,
    strict: bool = False,
    cache_seqlens: Any = None,
    block_table: Tensor | None = None,
    num_tokens: Any = None,
    positions: Tensor | None = None,
    window_size: int | None = None,
    k_scale: Any = None,
    v_scale: Any = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    **numbers: Any,
) -> tuple[Tensor, Tensor]:
    rows = rows_of(q, num_tokens, cu_seqlens_q)
    if q_rank is None or k_rank is None:  # the mask alone decides
        capacity = k.shape[1] * (1 if block_table is None else block_table.shape[1])
        packed = cu_seqlens_k is not None
        q_rank = torch.zeros(q.shape[:1] if cu_seqlens_q is not None else (1, q.shape[1]))
        k_rank = torch.zeros(k.shape[:1] if packed else (1, capacity))
        if mask is not None and mask.dtype == torch.bool and not packed:
            k_rank = k_rank[:, : mask.shape[-1]]
    keys: list[list[tuple[Index | None, int]]] = []  # of a request: where key j lies, its rank
    for b in range(len(rows)):
        if cu_seqlens_k is not None:
            span = range(int(cu_seqlens_k[b]), int(cu_seqlens_k[b + 1]))
            keys.append([((t,), int(k_rank[t])) for t in span])
        else:
            ranks = k_rank[b if k_rank.shape[0] > 1 else 0].tolist()
            n = per_request(cache_seqlens, b, len(ranks))
            keys.append([(slot_of(k, block_table, b, j), ranks[j]) for j in range(n)])

    def rank_of(b: int, i: int) -> int:
        if cu_seqlens_q is not None:
            return int(q_rank[rows[b][i]])
        return int(q_rank[b if q_rank.shape[0] > 1 else 0, i])

    def visible(b: int, i: int) -> list[tuple[str, Index]]:
        at = len(keys[b]) - len(rows[b]) + i if positions is None else int(positions[rows[b][i]])
        found: list[tuple[str, Index]] = []
        for j, (slot, rank) in enumerate(keys[b]):
            if slot is None or rank == PAD or rank > rank_of(b, i):
                continue
            if strict and rank == rank_of(b, i):
                continue
            if mask is not None and not sees_row(mask, b, i, j, rows[b][i]):
                continue
            if window_size is None or j > at - window_size:
                found.append(("cache", slot))
        return found

    flat = [
        (b, i, index)
        for b, own in enumerate(rows)
        for i, index in enumerate(own)
        if rank_of(b, i) != PAD
    ]
    return solve(q, {"cache": (k, v, k_scale, v_scale)}, flat, visible, **numbers)


# ---- comparison ---------------------------------------------------------------------------------


def poison(x: Tensor, kept: set[Index]) -> Tensor:
    """x, in its own strides, with NaN wherever no query looks."""
    source = x.float() if x.element_size() == 1 else x
    bad = torch.full_like(source, torch.nan)
    for index in kept:
        bad[index] = source[index]
    result = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    return result.copy_(bad.to(x.dtype))


def verify(op: str, args: list[Any], kwargs: dict[str, Any], backend: str) -> None:
    """The op, on inputs poisoned where nobody looks, against its oracle."""
    oracle = globals()[op]
    seen: set[tuple[str, Index]] = set()
    want = oracle(*args, **kwargs, seen=seen)
    dtype = args[0].dtype
    plain = oracle(*args, **kwargs, dtype=dtype) if dtype != torch.float64 else want
    names = ("q", "cache", "cache", "rows", "rows")
    args = [
        None if x is None else poison(x, {index for n, index in seen if n == name})
        for name, x in zip(names, args)
    ]
    got = getattr(pydecode, op)(*args, **kwargs, return_lse=True, backend=backend)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert got[0].dtype == dtype
    assert got[1].dtype == wide
    for x, exact, low in zip(got, want, plain):
        assert_close(x, exact, low)


def assert_close(got: Tensor, want: Tensor, plain: Tensor | None = None) -> None:
    """fp64: 1e-12. Else at most twice the plain formula's error, plus rounding of the output."""
    assert got.shape == want.shape
    nowhere = want == -torch.inf
    assert torch.equal(got == -torch.inf, nowhere)
    got, exact = (torch.where(nowhere, 0.0, x.double()) for x in (got, want))
    if not got.numel():
        return
    size = exact.abs().max().item()
    error = (got - exact).abs()
    if plain is None or plain.dtype == torch.float64:
        assert error.max() <= 1e-12 * max(size, 1.0), error.max()
        return
    # and the accumulation's own noise, where a tiny case has luck (as in check/compare.py)
    rounding = (torch.finfo(plain.dtype).eps + 4 * torch.finfo(torch.float32).eps) * size
    low = (torch.where(nowhere, 0.0, plain.double()) - exact).abs()
    assert error.max() <= 2 * low.max() + rounding, (error.max(), low.max(), rounding)
    rms, low_rms = error.square().mean().sqrt(), low.square().mean().sqrt()
    assert rms <= 2 * low_rms + rounding / 2, (rms, low_rms, rounding)
