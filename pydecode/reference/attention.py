"""The formula that every attention op shares: rows in flight over a cached context.

Each request is computed on its own, so a request's bits cannot depend on its batch. Nothing here
synchronises: on a CUDA device the table's capacity bounds the context and the mask does the rest;
on the CPU the length is free to read, so only the context itself is touched.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

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
    def scaled(self) -> bool:
        return any(isinstance(x, Tensor) or x != 1.0 for x in (self.k_scale, self.v_scale))

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
    visible: Tensor,
    *,
    softmax_scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T) v of one request under an explicit mask.

    q [Hq, N, D], k [Hkv, S, D], v [Hkv, S, Dv], visible bool [N, S] -> out [Hq, N, Dv],
    lse [Hq, N].
    """
    Hq, N, D = q.shape
    Hkv, S, Dv = v.shape
    group = Hq // Hkv
    s = ((softmax_scale * q).reshape(Hkv, group * N, D) @ k.mT).view(Hkv, group, N, S)
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~visible, -torch.inf)
    # log-sum-exp, with -inf for a row that sees nothing, and the sink as one more logit
    top = s.amax(-1) if S else s.new_full((Hkv, group, N), -torch.inf)
    if sinks is not None:
        sink = sinks.to(s.dtype).view(Hkv, group, 1)
        top = torch.maximum(top, sink)
    base = top.clamp(min=torch.finfo(s.dtype).min)  # finite, so that exp(-inf - base) is 0
    p = (s - base[..., None]).exp_()
    total = p.sum(-1)
    if sinks is not None:
        total = total + torch.exp(sink - base)
    p = p.div_(torch.where(total == 0, 1.0, total)[..., None]).view(Hkv, group * N, S)
    out = p @ v
    if out.device.type != "cpu" or not out.sum().isfinite():
        out = _weigh_selected(p, v, visible.repeat(group, 1))
    lse = base + torch.log(total)
    return out.view(Hq, N, Dv), lse.view(Hq, N)


def _weigh_selected(p: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """p @ v where an invisible NaN or Inf of v counts as absent: selected away, not times 0."""
    out = p @ torch.where(v.isfinite(), v, 0.0)
    seen = visible.to(v.dtype)
    for bad, value in ((v == torch.inf, torch.inf), (v == -torch.inf, -torch.inf)):
        out = out + torch.where(seen @ bad.to(v.dtype) > 0, value, 0.0)
    return torch.where(seen @ v.isnan().to(v.dtype) > 0, torch.nan, out)


def gather(cache: Cache, b: int, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """K [n, Hkv, D], V [n, Hkv, Dv] of request b's cache positions [n], and which are mapped."""
    inside = (positions >= 0) & (positions < cache.capacity)
    safe = torch.where(inside, positions, 0)
    if cache.capacity == 0 or cache.k.shape[0] == 0:  # nothing to index
        shape = (positions.shape[0], cache.k.shape[2])
        k = cache.k.new_zeros(*shape, cache.k.shape[3], dtype=dtype)
        return k, k.new_zeros(*shape, cache.v.shape[3]), torch.zeros_like(inside)
    if cache.block_table is None:
        k, v, mapped = cache.k[b, safe], cache.v[b, safe], inside
    else:
        num_pages, page_size = cache.k.shape[:2]
        page = cache.block_table[b].long()[safe // page_size]
        mapped = inside & (page >= 0) & (page < num_pages)
        page = torch.where(mapped, page, 0)
        k, v = cache.k[page, safe % page_size], cache.v[page, safe % page_size]
    return _scaled(k, cache.k_scale, b, dtype), _scaled(v, cache.v_scale, b, dtype), mapped


def gather_first(cache: Cache, b: int, n: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """``gather`` of the positions 0 .. n-1, page by page."""
    if cache.block_table is None or n == 0 or cache.k.shape[0] == 0:
        return gather(cache, b, torch.arange(n, device=cache.k.device), dtype)
    num_pages, page_size = cache.k.shape[:2]
    page = cache.block_table[b, : -(-n // page_size)].long()
    inside = (page >= 0) & (page < num_pages)
    page = torch.where(inside, page, 0)
    k, v = (x.index_select(0, page).flatten(0, 1)[:n] for x in (cache.k, cache.v))
    mapped = inside[:, None].expand(-1, page_size).flatten()[:n]
    return _scaled(k, cache.k_scale, b, dtype), _scaled(v, cache.v_scale, b, dtype), mapped


def _scaled(x: Tensor, scale: Tensor | float, b: int, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    if isinstance(scale, Tensor):
        return x * scale[b].to(dtype)[:, None]
    return x if scale == 1.0 else x * scale


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
) -> tuple[Tensor, Tensor]:
    """Rows in flight q [B, N, Hq, D] over their context and each other.

    local bool [B|1, N, N]: row i sees row j. valid bool [B, N]: rows of a ragged batch; the others
    see nothing, not even a sink. k, v None: the rows' own K/V lie in the cache at rows_at[b] + j.
    Returns out [B, N, Hq, Dv], lse [B, Hq, N].
    """
    B, N, Hq, _ = q.shape
    dtype = compute_dtype(q.dtype)
    out = q.new_zeros(B, N, Hq, cache.v.shape[-1])
    lse = q.new_full((B, Hq, N), -torch.inf, dtype=dtype)
    on_cpu = q.device.type == "cpu"
    i = torch.arange(N, device=q.device)
    # unscaled K/V of q's own dtype are gathered as they are, and converted once they are together
    as_is = cache.k.dtype == cache.v.dtype == q.dtype and not cache.scaled
    kept = q.dtype if as_is else dtype
    for b in range(B):
        n = min(max(int(context.stop[b]), 0), cache.capacity) if on_cpu else cache.capacity
        m = N  # rows; so on the CPU a ragged request is computed as if it were alone
        if on_cpu and valid is not None and N:
            m = int(torch.where(valid[b], i + 1, 0).max())
        # context: cached K/V and which rows see them
        at = torch.arange(n, device=q.device)
        k_context, v_context, mapped = gather_first(cache, b, n, kept)
        sees = (mapped if on_cpu else mapped & (at < context.stop[b])).expand(m, n)
        if context.start is not None:
            sees = sees & (at >= context.start[b])
        if context.hole is not None and context.hole_end is not None:
            sees = sees & ~((at >= context.hole[b]) & (at < context.hole_end[b]))
        if context.lowest is not None:
            sees = sees & (at >= context.lowest[b, :m, None])
        # rows in flight: their own K/V and who sees whom
        among = local[b if local.shape[0] > 1 else 0, :m, :m]
        if k is None or v is None:
            k_rows, v_rows, mapped = gather(cache, b, rows_at[b] + i[:m], kept)
            among = among & mapped
        else:
            k_rows, v_rows = k[b, :m].to(kept), v[b, :m].to(kept)
        if valid is not None:
            among = among & valid[b, :m] & valid[b, :m, None]
            sees = sees & valid[b, :m, None]
        out_b, lse_b = attend(
            q[b, :m].to(dtype).transpose(0, 1),
            torch.cat([k_context, k_rows]).to(dtype).transpose(0, 1),
            torch.cat([v_context, v_rows]).to(dtype).transpose(0, 1),
            torch.cat([sees, among], dim=1),
            softmax_scale=softmax_scale,
            softcap=softcap,
            sinks=sinks,
        )
        if valid is not None:
            out_b = torch.where(valid[b, :m, None], out_b, 0.0)
            lse_b = torch.where(valid[b, :m], lse_b, -torch.inf)
        out[b, :m] = out_b.transpose(0, 1).to(q.dtype)
        lse[b, :, :m] = lse_b
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
