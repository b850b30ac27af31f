"""Random cases of the attention ops."""

from typing import Any

import torch
from torch import Tensor

from .. import ranks, trees
from ..reference.attention import unpack_mask
from ..trees.masks import pack_bits
from .draw import Case, Draw


def _heads(d: Draw) -> tuple[int, int, int, int]:
    """Hq, Hkv, D, Dv."""
    Hkv, group = d.choice([1, 2, 3, 8]), d.choice([1, 2, 4, 7])
    D = d.choice([16, 64, 80, 128, 128, 256])
    return Hkv * group, Hkv, D, D if d.chance(0.8) else d.choice([16, 64, 128])


def _lengths(d: Draw, B: int) -> list[int]:
    longest = d.choice([0, 5, 100, 300, 3000 if d.big else 300])
    if d.chance(0.3):  # whole pages and tiles, or one more or less
        return [max(64 * d.integer(0, longest // 64 + 1) + d.integer(-1, 1), 0) for _ in range(B)]
    return [d.integer(0, longest) for _ in range(B)]


def _fp8(d: Draw) -> torch.dtype | None:
    wide = d.dtype in (torch.float16, torch.bfloat16) and d.chance(0.25)
    return d.choice([torch.float8_e4m3fn, torch.float8_e5m2]) if wide else None


def _options(d: Draw, B: int, Hq: int, Hkv: int, scaled: bool) -> dict[str, Any]:
    """What every attention op takes."""
    kwargs: dict[str, Any] = {"return_lse": True}
    if d.chance(0.3):
        kwargs["softcap"] = d.choice([1.0, 30.0])
    if d.chance(0.3):
        kwargs["sinks"] = d.normal(Hq, dtype=torch.float32)
    if d.chance(0.3):
        kwargs["softmax_scale"] = 0.2
    if scaled:
        shape: list[tuple[int, ...]] = [(), (Hkv,), (B, Hkv)]
        kwargs["k_scale"] = d.uniform(*d.choice(shape)) + 0.5
        kwargs["v_scale"] = d.uniform(*d.choice(shape)) + 0.5
    return kwargs


def _label(**parts: Any) -> str:
    return " ".join(f"{k}={v}" if v is not True else k for k, v in parts.items() if v is not None)


def _context(d: Draw, B: int, rows: int, Hkv: int, dims: tuple[int, int]) -> dict[str, Any]:
    """Lengths, and caches with that context and, every other time, the rows' own K/V behind it."""
    lengths, fp8 = _lengths(d, B), _fp8(d)
    inside = d.chance(0.4)  # the rows' own K/V lie in the cache
    held = [n + rows for n in lengths] if inside else lengths
    (k_cache, v_cache), table = d.cache(held, Hkv, dims, fp8 or d.dtype)
    return dict(lengths=lengths, k=k_cache, v=v_cache, table=table, inside=inside, fp8=fp8)


def _rows(d: Draw, *shape: int) -> Tensor:
    return d.strided(d.normal(*shape))


def _packed(d: Draw, kind: str, longest: int) -> Case:
    """A packed batch of trees ("tree"), or of blocks ("block"): ragged rows behind cu_seqlens_q."""
    B = d.integer(1, 4)
    sizes = [d.integer(0, longest) for _ in range(B)]
    total, widest = sum(sizes), max([*sizes, 1]) + d.integer(0, 3)
    Hq, Hkv, D, Dv = _heads(d)
    lengths, fp8, inside = _lengths(d, B), _fp8(d), d.chance(0.4)
    held = [n + rows if inside else n for n, rows in zip(lengths, sizes)]
    (k_cache, v_cache), table = d.cache(held, Hkv, (D, Dv), fp8 or d.dtype)
    kwargs = _options(d, B, Hq, Hkv, scaled=fp8 is not None)
    cu = torch.tensor([sum(sizes[:i]) for i in range(B + 1)], device=d.device)
    kwargs.update(cu_seqlens_q=cu.to(d.choice([torch.int32, torch.int64])), max_seqlen_q=widest)
    kwargs["cache_seqlens"] = torch.tensor(lengths, device=d.device)
    kwargs["block_table"] = table
    masked = d.chance(0.7)
    if masked:
        mask = d.bools(0.5, total, widest)
        for b, n in enumerate(sizes):
            if kind == "tree" and n:
                local = unpack_mask(trees.mask_from_parents(d.tree(n)[None]), n)[0]
                mask[int(cu[b]) : int(cu[b]) + n, :n] = local
        kwargs["mask"] = pack_bits(mask) if d.chance(0.5) else mask
    elif kind == "tree":
        kwargs["mask"] = "causal"
    else:
        kwargs["causal"] = d.bools(0.5, B)
    if d.chance(0.3):
        kwargs["window_size"] = d.integer(1, 50)
        if d.chance(0.5):
            kwargs["positions"] = d.integers(0, 300, total)
    k = v = None
    if not inside:
        k, v = _rows(d, total, Hkv, D), _rows(d, total, Hkv, Dv)
    label = _label(packed=sizes, Hq=Hq, Hkv=Hkv, D=D, Dv=Dv, context=lengths, mask=masked)
    label += _cache_label(dict(table=table, k=k_cache, fp8=fp8, inside=inside))
    return Case((_rows(d, total, Hq, D), k_cache, v_cache, k, v), kwargs, label)


def tree_attention(d: Draw) -> Case:
    if d.chance(0.2):
        return _packed(d, "tree", 65)
    B, N = d.integer(1, 4), d.choice([1, 2, 7, 33, 64, 65])
    Hq, Hkv, D, Dv = _heads(d)
    c = _context(d, B, N, Hkv, (D, Dv))
    kwargs = _options(d, B, Hq, Hkv, scaled=c["fp8"] is not None)
    kwargs["cache_seqlens"] = torch.tensor(c["lengths"], device=d.device)
    kwargs["block_table"] = c["table"]
    kind = d.choice(["tree", "tree", "causal", "none", "bool"])
    if kind == "tree":
        parents = torch.stack([d.tree(N) for _ in range(d.choice([1, B]))])
        kwargs["mask"] = trees.mask_from_parents(parents)
    elif kind == "bool":
        kwargs["mask"] = d.bools(0.5, B, N, N)
    elif kind == "causal":
        kwargs["mask"] = "causal"
    if d.chance(0.3):
        kwargs["num_tokens"] = d.integers(0, N, B)
    if d.chance(0.3):
        kwargs["window_size"] = d.integer(1, 50)
        if d.chance(0.5):
            kwargs["positions"] = d.integers(0, 300, B, N)
    k = v = None
    if not c["inside"]:
        k, v = _rows(d, B, N, Hkv, D), _rows(d, B, N, Hkv, Dv)
    label = _label(B=B, N=N, Hq=Hq, Hkv=Hkv, D=D, Dv=Dv, context=c["lengths"], mask=kind)
    return Case((_rows(d, B, N, Hq, D), c["k"], c["v"], k, v), kwargs, label + _cache_label(c))


def _cache_label(c: dict[str, Any]) -> str:
    page = "dense" if c["table"] is None else f"page={c['k'].shape[1]}"
    fp8 = "" if c["fp8"] is None else f" {c['fp8']}".replace("torch.", "")
    return f" {page}{fp8}{' in-cache' if c['inside'] else ''}"


def block_attention(d: Draw) -> Case:
    if d.chance(0.2):
        return _packed(d, "block", 33)
    B, L = d.integer(1, 4), d.choice([1, 4, 8, 32, 65])
    Hq, Hkv, D, Dv = _heads(d)
    c = _context(d, B, L, Hkv, (D, Dv))
    lengths = torch.tensor(c["lengths"], device=d.device)
    kwargs = _options(d, B, Hq, Hkv, scaled=c["fp8"] is not None)
    kwargs["block_table"] = c["table"]
    kwargs["cache_seqlens"] = lengths
    hole = not c["inside"] and d.chance(0.5)
    if hole:  # the dual cache: a block in the middle, or none for that request
        at = [d.integer(-1, max(n - 1, 0)) for n in c["lengths"]]
        kwargs["replace_at"] = torch.tensor(at, device=d.device)
    if d.chance(0.3):
        kwargs["cache_starts"] = d.integers(0, 8, B)
    kind = d.choice(["none", "none", "causal", "bool"])
    if kind == "causal":
        kwargs["causal"] = d.bools(0.5, B)
    elif kind == "bool":
        kwargs["mask"] = d.bools(0.5, B, L, L)
    if d.chance(0.3):
        kwargs["window_size"] = d.integer(1, 50)
        if d.chance(0.5):
            kwargs["positions"] = d.integers(0, 300, B, L)
    if d.chance(0.3):
        kwargs["num_tokens"] = d.integers(0, L, B)
    k = v = None
    if not c["inside"]:
        k, v = _rows(d, B, L, Hkv, D), _rows(d, B, L, Hkv, Dv)
    label = _label(B=B, L=L, Hq=Hq, Hkv=Hkv, D=D, Dv=Dv, context=c["lengths"], mask=kind)
    label += (" hole" if hole else "") + _cache_label(c)
    return Case((_rows(d, B, L, Hq, D), c["k"], c["v"], k, v), kwargs, label)


def branch_attention(d: Draw) -> Case:
    B, K, L = d.integer(1, 3), d.integer(1, 5), d.choice([1, 4, 16])
    Hq, Hkv, D, Dv = _heads(d)
    lengths, fp8 = _lengths(d, B), _fp8(d)
    (k_cache, v_cache), table = d.cache(lengths, Hkv, (D, Dv), fp8 or d.dtype)
    kwargs = _options(d, B, Hq, Hkv, scaled=fp8 is not None)
    kwargs["cache_seqlens"] = torch.tensor(lengths, device=d.device)
    kwargs["block_table"] = table
    kwargs["causal"] = d.choice([False, True, d.bools(0.5, B)])
    if d.chance(0.4):
        kwargs["num_branches"] = d.integers(0, K, B)
    if d.chance(0.3):
        kwargs["num_tokens"] = d.integers(0, L, B)
    if d.chance(0.3):
        kwargs["cache_starts"] = d.integers(0, 8, B)
    if d.chance(0.3):
        kwargs["window_size"] = d.integer(1, 50)
    if d.chance(0.3):
        at = [d.integer(-1, max(n - 1, 0)) for n in lengths]
        kwargs["replace_at"] = torch.tensor(at, device=d.device)
    label = _label(B=B, K=K, L=L, Hq=Hq, Hkv=Hkv, D=D, Dv=Dv, context=lengths)
    label += _cache_label(dict(table=table, k=k_cache, fp8=fp8, inside=False))
    q = _rows(d, B, K, L, Hq, D)
    fresh = (_rows(d, B, K, L, Hkv, D), _rows(d, B, K, L, Hkv, Dv))
    return Case((q, k_cache, v_cache, *fresh), kwargs, label)


def _masked(d: Draw) -> Case:
    """A mask of any queries by any keys, with ranks or without."""
    Hq, Hkv, D, Dv = _heads(d)
    B, Nq, Nk = d.integer(1, 3), d.choice([1, 17, 64, 65]), d.choice([1, 63, 64, 65, 200])
    lengths, fp8 = [d.integer(0, Nk) for _ in range(B)], _fp8(d)
    lengths[0] = Nk
    (k, v), table = d.cache(lengths, Hkv, (D, Dv), fp8 or d.dtype)
    wide = Nk if table is not None else k.shape[1]  # dense: a column for every slot
    kwargs = _options(d, B, Hq, Hkv, scaled=fp8 is not None)
    mask = d.bools(0.5, d.choice([1, B]), Nq, wide)
    ranked = d.chance(0.5)
    if ranked:
        kwargs["q_rank"] = d.integers(-3, 9, B, Nq, dtype=torch.int32)
        kwargs["k_rank"] = d.integers(-3, 9, d.choice([1, B]), wide, dtype=torch.int32)
        kwargs["strict"] = d.chance(0.3)
    # without ranks, packed bits are as wide as the table
    packed = d.chance(0.5) and (ranked or table is None)
    kwargs.update(mask=pack_bits(mask) if packed else mask, block_table=table)
    kwargs["cache_seqlens"] = torch.tensor(lengths, device=d.device)
    if d.chance(0.3):
        kwargs["num_tokens"] = d.integers(0, Nq, B)
    label = _label(B=B, Nq=Nq, keys=lengths, Hq=Hq, Hkv=Hkv, D=D, Dv=Dv, ranks=ranked)
    label += " bits" if packed else " bools"
    label += _cache_label(dict(table=table, k=k, fp8=fp8, inside=False))
    return Case((_rows(d, B, Nq, Hq, D), k, v), kwargs, label)


def ranked_attention(d: Draw) -> Case:
    if d.chance(0.25):
        return _masked(d)
    Hq, Hkv, D, Dv = _heads(d)
    kind = d.choice(["causal", "block", "bidirectional", "random"])
    strict = d.chance(0.2)
    if d.chance(0.4):  # packed
        B = d.integer(1, 4)
        sizes = [d.integer(0, 100) for _ in range(B)]
        cu = torch.tensor([sum(sizes[:i]) for i in range(B + 1)], device=d.device)
        total, longest = sum(sizes), max([*sizes, 1])
        rank = torch.cat([torch.arange(n) for n in sizes]).int().to(d.device) // d.choice([1, 8])
        q, k = _rows(d, total, Hq, D), _rows(d, total, Hkv, D)
        kwargs = _options(d, B, Hq, Hkv, scaled=False)
        kwargs.update(q_rank=rank, k_rank=rank, cu_seqlens_q=cu, cu_seqlens_k=cu)
        kwargs.update(max_seqlen_q=longest, max_seqlen_k=longest, strict=strict)
        label = _label(packed=sizes, Hq=Hq, Hkv=Hkv, D=D, Dv=Dv, strict=strict or None)
        return Case((q, k, _rows(d, total, Hkv, Dv)), kwargs, label)
    B, N = d.integer(1, 3), d.choice([1, 17, 64, 130, 1000 if d.big else 130])
    if kind == "causal":
        rank = ranks.causal(N, d.device)
    elif kind == "block":
        rank = ranks.block_causal(N, d.choice([2, 8, 32]), d.device)
    elif kind == "bidirectional":
        rank = ranks.bidirectional(d.integers(0, N, B), N)
    else:
        rank = d.integers(-3, 9, B, N, dtype=torch.int32)
    (k, v), table = d.cache([N] * B, Hkv, (D, Dv), d.dtype)
    kwargs = _options(d, B, Hq, Hkv, scaled=False)
    kwargs.update(q_rank=rank, strict=strict)
    if table is not None:
        kwargs["block_table"] = table
        kwargs["k_rank"] = rank
    else:
        width = k.shape[1]
        kwargs["k_rank"] = torch.nn.functional.pad(rank, (0, width - N), value=ranks.PAD)
    if d.chance(0.3):
        kwargs["window_size"] = d.integer(1, 50)
        kwargs["positions"] = torch.arange(N, device=d.device).expand(B, N)
    label = _label(B=B, N=N, Hq=Hq, Hkv=Hkv, D=D, Dv=Dv, ranks=kind, strict=strict or None)
    return Case((_rows(d, B, N, Hq, D), k, v), kwargs, label)


def merge_states(d: Draw) -> Case:
    M, B, N, H, D = d.integer(1, 5), d.integer(1, 3), d.integer(1, 40), d.integer(1, 8), 64
    wide = torch.float64 if d.dtype == torch.float64 else torch.float32
    lses = d.normal(M, B, H, N, scale=20.0, dtype=wide)
    empty = d.bools(0.2, M, B, H, N)
    outs = d.normal(M, B, N, H, D).masked_fill(empty.transpose(2, 3)[..., None], 0.0)
    kwargs: dict[str, Any] = {}
    if d.chance(0.5):
        kwargs["temperatures"] = d.uniform(M) + 0.5
        kwargs["scales"] = d.uniform(M) + 0.5
    if d.chance(0.4):
        kwargs["mask"] = d.bools(0.5, B, N)
    lses = lses.masked_fill(empty, -torch.inf)
    return Case((outs, lses), kwargs, _label(M=M, B=B, N=N, H=H, D=D))
