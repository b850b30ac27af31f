"""The formula that every attention op shares: rows in flight over a cached context.

Each request is computed on its own, so a request's bits cannot depend on its batch. Nothing here
synchronises: on a CUDA device the table's capacity bounds the context and the mask does the rest;
on the CPU the length is free to read, so only the context itself is touched.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .memo import remember_last
from .numbers import compute_dtype


class Context(NamedTuple):
    """What the rows of a batch see of the cache: positions [start, stop) less [hole, hole_end)."""

    stop: Tensor  # [B], clipped to the cache
    start: Tensor | None = None  # [B]
    hole: Tensor | None = None  # [B]
    hole_end: Tensor | None = None  # [B]
    lowest: Tensor | None = None  # [B, N], a window: the lowest position that row i sees


class Cache(NamedTuple):
    """A K/V cache, paged ([pages, page_size, Hkv, D] with a table) or not ([B, S, Hkv, D])."""

    k: Tensor
    v: Tensor
    block_table: Tensor | None
    k_scale: Tensor | float  # a float, or [B, Hkv]
    v_scale: Tensor | float

    @property
    def capacity(self) -> int:
        if self.block_table is None:
            return self.k.shape[1]
        return self.block_table.shape[1] * self.k.shape[1]


def scale_argument(
    number: float, tensor: Tensor | None, batch: int, num_kv_heads: int
) -> Tensor | float:
    """The fp8 scale pair as a float or [B, Hkv]."""
    return number if tensor is None else tensor.float().expand(batch, num_kv_heads)


def cache_of(
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None,
    batch: int,
    k_scale: float,
    k_scale_tensor: Tensor | None,
    v_scale: float,
    v_scale_tensor: Tensor | None,
) -> Cache:
    """The cache of a call from the schema's arguments."""
    Hkv = k.shape[2]
    return Cache(
        k,
        v,
        block_table,
        scale_argument(k_scale, k_scale_tensor, batch, Hkv),
        scale_argument(v_scale, v_scale_tensor, batch, Hkv),
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    *,
    softmax_scale: float,
    softcap: float,
    sinks: Tensor | None,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k^T) v of one request under an explicit mask.

    q [Hq, N, D], k [Hkv, S, D], v [Hkv, S, Dv], visible bool [N, S] (None: every row sees every
    key) -> out [Hq, N, Dv], lse [Hq, N].
    """
    Hq, N, D = q.shape
    Hkv, S, Dv = v.shape
    group = Hq // Hkv
    s = ((softmax_scale * q).reshape(Hkv, group * N, D) @ k.mT).view(Hkv, group, N, S)
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    if visible is not None:
        s.masked_fill_(~visible, -torch.inf)
    if sinks is not None:  # one more logit a head, with no value
        s = torch.cat([s, sinks.to(s.dtype).view(Hkv, group, 1, 1).expand(-1, -1, N, 1)], dim=-1)
    lse = None
    if return_lse:
        lse = s.logsumexp(-1) if s.shape[-1] else s.new_full((Hkv, group, N), -torch.inf)
        lse = lse.view(Hq, N)
    p = s.softmax(-1)[..., :S].reshape(Hkv, group * N, S)
    out = p @ v
    if visible is None:
        return out.view(Hq, N, Dv), lse
    if out.device.type != "cpu" or not out.sum().isfinite():
        out = _weigh_selected(p, v, visible.repeat(group, 1))
    out = out.view(Hq, N, Dv)
    if sinks is None:  # a row that sees nothing gives 0 (the softmax gave NaN)
        out = out.masked_fill(~visible.any(-1, keepdim=True), 0.0)
    return out, lse


def _weigh_selected(p: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """p @ v where an invisible NaN or Inf of v counts as absent: selected away, not times 0."""
    out = p @ torch.where(v.isfinite(), v, 0.0)
    seen = visible.to(v.dtype)
    for bad, value in ((v == torch.inf, torch.inf), (v == -torch.inf, -torch.inf)):
        out = out + torch.where(seen @ bad.to(v.dtype) > 0, value, 0.0)
    return torch.where(seen @ v.isnan().to(v.dtype) > 0, torch.nan, out)


def locate(
    positions: Tensor, b: int, block_table: Tensor | None, num_pages: int, page_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Page and offset of request b's cache positions [n], and which of them are mapped.

    Without a table a request is its own page. What is not mapped lies at page 0, offset 0.
    """
    if block_table is None:
        mapped = (positions >= 0) & (positions < page_size)
        page = torch.full_like(positions, b)
    elif num_pages * page_size * block_table.shape[1] == 0:  # nothing to index
        mapped = torch.zeros_like(positions, dtype=torch.bool)
        page = torch.zeros_like(positions)
    else:
        capacity = block_table.shape[1] * page_size
        mapped = (positions >= 0) & (positions < capacity)
        page = block_table[b].long()[torch.where(mapped, positions, 0) // page_size]
        mapped = mapped & (page >= 0) & (page < num_pages)
    offset = positions % max(page_size, 1)
    return torch.where(mapped, page, 0), torch.where(mapped, offset, 0), mapped


def context_pages(
    n: int, b: int, block_table: Tensor | None, num_pages: int, page_size: int
) -> Tensor | None:
    """The pages of request b's positions 0 .. n-1 (page 0 for an unmapped one); None: no table."""
    if block_table is None or num_pages == 0:
        return None
    page = block_table[b, : -(-n // max(page_size, 1))].long()
    return torch.where((page >= 0) & (page < num_pages), page, 0)


def read_context(x: Tensor, b: int, n: int, page: Tensor | None) -> Tensor:
    """K or V [n, H, D] of request b's positions 0 .. n-1 out of the cache x, as it is stored."""
    if page is not None:
        return x.index_select(0, page).flatten(0, 1)[:n]
    return x[b, :n] if x.shape[0] else x.new_zeros(n, *x.shape[2:])  # a pool without pages


class Seen(NamedTuple):
    """What the rows of one request read and see."""

    n: int  # context positions that are read
    m: int  # rows that are computed
    page: Tensor | None  # [ceil(n / page_size)], the context's pages; None: no table
    row_page: Tensor | None  # [m], where the rows' own K/V lie, if in the cache
    row_offset: Tensor | None
    # bool [m, n + m]: row i sees cached position j, row i sees row j - n. None: everything
    visible: Tensor | None


@remember_last
def what_rows_see(
    B: int,
    N: int,
    on_cpu: bool,
    block_table: Tensor | None,
    num_pages: int,
    page_size: int,
    stop: Tensor,
    start: Tensor | None,
    hole: Tensor | None,
    hole_end: Tensor | None,
    lowest: Tensor | None,
    local: Tensor,
    valid: Tensor | None,
    rows_at: Tensor | None,
) -> list[Seen]:
    """One ``Seen`` a request, from metadata alone. rows_at: [B] if the rows' K/V are cached."""
    capacity = page_size * (1 if block_table is None else block_table.shape[1])
    i = torch.arange(N, device=stop.device)
    result = []
    for b in range(B):
        n = min(max(int(stop[b]), 0), capacity) if on_cpu else capacity
        m = N  # so on the CPU a ragged request is computed as if it were alone
        if on_cpu and valid is not None and N:
            m = int(torch.where(valid[b], i + 1, 0).max())
        # the context
        at = torch.arange(n, device=stop.device)
        _, _, mapped = locate(at, b, block_table, num_pages, page_size)
        sees = (mapped & (at < stop[b])).expand(m, n)
        if start is not None:
            sees = sees & (at >= start[b])
        if hole is not None and hole_end is not None:
            sees = sees & ~((at >= hole[b]) & (at < hole_end[b]))
        if lowest is not None:
            sees = sees & (at >= lowest[b, :m, None])
        page = context_pages(n, b, block_table, num_pages, page_size)
        # the rows in flight
        among = local[b if local.shape[0] > 1 else 0, :m, :m]
        row_page = row_offset = None
        if rows_at is not None:
            where = (rows_at[b] + i[:m], b, block_table, num_pages, page_size)
            row_page, row_offset, mapped = locate(*where)
            among = among & mapped
        if valid is not None:
            among = among & valid[b, :m] & valid[b, :m, None]
            sees = sees & valid[b, :m, None]
        visible = torch.cat([sees, among], dim=1)
        everything = on_cpu and visible.numel() > 0 and bool(visible.all())
        result.append(Seen(n, m, page, row_page, row_offset, None if everything else visible))
    return result


def gather(x: Tensor, b: int, seen: Seen, rows: Tensor | None, dtype: torch.dtype) -> Tensor:
    """K or V [n + m, H, D] of request b: its context out of the cache x, then its rows."""
    context = read_context(x, b, seen.n, seen.page)
    if rows is not None:
        own = rows[b, : seen.m]
    elif x.shape[0] * x.shape[1]:
        own = x[seen.row_page, seen.row_offset]
    else:
        own = x.new_zeros(seen.m, *x.shape[2:])
    return torch.cat([context.to(dtype), own.to(dtype)])


def scaled(x: Tensor, scale: Tensor | float, b: int, cached: int) -> Tensor:
    """The first ``cached`` rows of x [n + m, H, D] times the cache's scale."""
    if isinstance(scale, Tensor):
        scale = scale[b].to(x.dtype)[:, None]
    elif scale == 1.0:
        return x
    return torch.cat([x[:cached] * scale, x[cached:]])


def attend_cached(
    q: Tensor,
    cache: Cache,
    k: Tensor | None,
    v: Tensor | None,
    context: Context,
    local: Tensor,
    valid: Tensor | None,
    rows_at: Tensor,
    *,
    softmax_scale: float,
    softcap: float,
    sinks: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Rows in flight q [B, N, Hq, D] over their context and each other.

    local bool [B|1, N, N]: row i sees row j. valid bool [B, N]: rows of a ragged batch; the others
    see nothing, not even a sink. k, v None: the rows' own K/V lie in the cache at rows_at[b] + j.
    Returns out [B, N, Hq, Dv], lse [B, Hq, N] (N = 0 if nobody asks for it).
    """
    B, N, Hq, _ = q.shape
    dtype = compute_dtype(q.dtype)
    out = q.new_zeros(B, N, Hq, cache.v.shape[-1])
    lse = q.new_full((B, Hq, N if return_lse else 0), -torch.inf, dtype=dtype)
    fresh = k is not None and v is not None
    everything = what_rows_see(
        *(B, N, q.device.type == "cpu", cache.block_table, *cache.k.shape[:2]),
        *(context.stop, context.start, context.hole, context.hole_end, context.lowest),
        *(local, valid, None if fresh else rows_at),
    )
    # 16-bit K/V are put together as they are, and converted once
    as_is = cache.k.dtype == cache.v.dtype == q.dtype
    together = q.dtype if as_is else dtype
    for b, seen in enumerate(everything):
        m, cached = seen.m, seen.n if fresh else seen.n + seen.m
        keys = gather(cache.k, b, seen, k if fresh else None, together).to(dtype)
        values = gather(cache.v, b, seen, v if fresh else None, together).to(dtype)
        out_b, lse_b = attend(
            q[b, :m].to(dtype).transpose(0, 1),
            scaled(keys, cache.k_scale, b, cached).transpose(0, 1),
            scaled(values, cache.v_scale, b, cached).transpose(0, 1),
            seen.visible,
            softmax_scale=softmax_scale,
            softcap=softcap,
            sinks=sinks,
            return_lse=return_lse,
        )
        if valid is not None:
            out_b = torch.where(valid[b, :m, None], out_b, 0.0)
        out[b, :m] = out_b.transpose(0, 1)
        if lse_b is not None:
            lse[b, :, :m] = lse_b if valid is None else lse_b.where(valid[b, :m], -torch.inf)
    return out, lse


# ---- masks and packed batches -------------------------------------------------------------------


def unpack_mask(mask: Tensor, n: int) -> Tensor:
    """Packed int64 [..., N, ceil(n/64)] -> bool [..., N, n]: bit j of row i, little end first."""
    j = torch.arange(n, device=mask.device)
    return (mask[..., j // 64] >> (j % 64)) & 1 == 1


def local_mask(mask: Tensor | None, causal: Tensor | bool, i: Tensor) -> Tensor:
    """Who sees whom among rows i = 0 .. n-1, [B|1, n, n]: as packed, all, or the past (causal)."""
    if mask is not None:
        return unpack_mask(mask, i.shape[0])
    past = (i[:, None] >= i)[None]
    if isinstance(causal, Tensor):
        return ~causal.view(-1, 1, 1) | past
    return past if causal else torch.ones_like(past)


def pad_packed(cu_seqlens: Tensor | None, width: int, *tensors: Tensor | None) -> list[Any]:
    """[total, ...] -> [B, width, ...]; slots past a request's length repeat some row of the batch.

    Without cu_seqlens nothing is packed, and the tensors return as they are.
    """
    if cu_seqlens is None:
        return list(tensors)
    at = cu_seqlens[:-1, None].long() + torch.arange(width, device=cu_seqlens.device)

    def pad(x: Tensor | None) -> Tensor | None:
        if x is None or x.shape[0] == 0:
            return None if x is None else x.new_zeros(*at.shape, *x.shape[1:])
        return x[at.clamp(0, x.shape[0] - 1)]

    return [pad(x) for x in tensors]


def lengths_of(cu_seqlens: Tensor, total: int, width: int) -> Tensor:
    """Lengths [B] of a packed batch, at most ``width``; 0 for a request not within [0, total]."""
    first, last = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    inside = (first >= 0) & (first <= last) & (last <= total)
    return torch.where(inside, (last - first).clamp(max=width), 0)


def unpad_packed(
    cu_seqlens: Tensor | None, total: int, return_lse: bool, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Results of the padded batch, out [B, width, Hq, Dv] and lse [B, Hq, width], packed again.

    A row that belongs to no request (the first one, should two overlap) gives 0 and -inf.
    """
    if not return_lse:
        lse = lse.new_empty(0)
    if cu_seqlens is None:
        return out, lse
    B, width, Hq = out.shape[:3]
    if B == 0 or width == 0 or total == 0:
        out = out.new_zeros(total, *out.shape[2:])
        return out, lse.new_full((Hq, total), -torch.inf) if return_lse else lse
    first = cu_seqlens[:-1].long()
    t = torch.arange(total, device=out.device)[:, None]
    mine = (t >= first) & (t < first + lengths_of(cu_seqlens, total, width))  # [total, B]
    b = mine.to(torch.uint8).argmax(-1)
    owned = mine.any(-1)
    i = torch.where(owned, t[:, 0] - first[b], 0)
    out = torch.where(owned[:, None, None], out[b, i], 0.0)
    if return_lse:
        lse = torch.where(owned, lse.transpose(1, 2)[b, i].T, -torch.inf).contiguous()
    return out, lse
