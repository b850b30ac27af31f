"""Committing an accepted path's K/V: the public function, its checks and its binding."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import attention_arguments as arguments
from . import binding
from .backends import choose, unavailable
from .reference import commit_kv as reference
from .replay import replayed
from .validation import (
    FLOATS,
    FP8,
    checking,
    data_range,
    expect_device,
    expect_dim,
    expect_dtype,
    expect_index,
    expect_last_contiguous,
    expect_shape,
    expect_tensor,
    number,
)
from .write_kv import expect_writable

HAS = ("reference", "triton")


@replayed
def commit_kv(
    k_caches: Sequence[Tensor] | Tensor,
    v_caches: Sequence[Tensor] | Tensor,
    path: Tensor,
    num_accepted: Tensor,
    *,
    cache_seqlens: int | Tensor,
    block_table: Tensor | None = None,
    source: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Keeps the accepted path's K/V of all layers, in place, and returns the new lengths.

    ``cache[cache_seqlens[b] + j] = cache[cache_seqlens[b] + path[b, j]]`` for j = 0 ..
    num_accepted[b], all rows read before any is written, or ``= source[:, b, path[b, j]]``; the new
    length is cache_seqlens[b] + num_accepted[b] + 1 (SpecInfer, Miao et al., ASPLOS 2024; Medusa,
    Cai et al., ICML 2024). Only slots whose source lies elsewhere are written; every other bit of
    the caches stays as it was.

    Args:
        k_caches: a sequence with one tensor a layer, equally shaped, [num_pages, page_size, Hkv, D]
            with a ``block_table``, else [B, S, Hkv, D]; or one tensor [layers, ...]. Floats or fp8,
            any strides but the last. v_caches: the same with Dv. Both are **mutated**.
        path: [B, P] int32/int64, as verification returns it: accepted nodes, root (0) first, then
            -1. Node i's K/V lie at cache position cache_seqlens[b] + i; node 0 is the last
            committed token, whose K/V this forward computed.
        num_accepted: [B] int32/int64, accepted nodes after the root.
        cache_seqlens: int or [B] int32/int64, committed positions before this forward.
        block_table: [B, max_pages] int32/int64. Pages wholly below cache_seqlens[b] may be shared
            between requests, later ones not. A row whose page lies outside the pool is not moved.
        source: (k_rows, v_rows), staging [layers, B, N, Hkv, D] and [layers, B, N, Hkv, Dv] in the
            cache's dtype (fp8 already scaled), so that rejected nodes never touch the pool.

    Returns:
        The new cache_seqlens [B], fresh, in the dtype of cache_seqlens (int32 for an int).

    An undecided request (path[b, 0] < 0) keeps its cache and its length. So does one with a bad
    path: its first num_accepted + 1 entries must start at 0, strictly increase, fit into P, stay
    below the row count (N of staging, else 1024) and lie, with what they are copied to, inside the
    request's cache; so a length never grows past the capacity.

    Raises:
        ValueError, TypeError: a shape, dtype, device or stride that does not fit, by name.
        BackendUnavailable: the named backend cannot run this call.

    >>> import torch, pydecode
    >>> cache = torch.arange(8.0).view(1, 1, 8, 1, 1)  # one layer, one request, eight positions
    >>> path, accepted = torch.tensor([[0, 2, 3, -1]]), torch.tensor([2])
    >>> pydecode.commit_kv(cache, cache.clone(), path, accepted, cache_seqlens=torch.tensor([2]))
    tensor([5])
    >>> cache.flatten().tolist()
    [0.0, 1.0, 2.0, 4.0, 5.0, 5.0, 6.0, 7.0]
    """
    path = expect_tensor("path", path)
    expect_dim("path", path, 2, "[B, P]")
    path = expect_index("path", path, path.shape, "[B, P]", path.device)
    B, device = path.shape[0], path.device
    num_accepted = expect_index("num_accepted", num_accepted, (B,), "[B]", device)
    paged = block_table is not None
    k_list = _expect_caches("k_caches", k_caches, B, paged, device)
    v_list = _expect_caches("v_caches", v_caches, B, paged, device)
    _expect_alike(k_list, v_list)
    if paged:
        arguments.expect_table(block_table, B, device)
    length, tensor = number("cache_seqlens", cache_seqlens, B, device, kind=int, minimum=0)
    if tensor is None:
        tensor = torch.full((B,), length, dtype=torch.int32, device=device)
    k_rows, v_rows = _expect_source(source, k_list, v_list, B, device)
    if checking():
        _check_paths(path, num_accepted, tensor.expand(B), k_list, block_table, k_rows)
    return binding.call(
        _op,
        _run,
        *(k_list, v_list, path, num_accepted, tensor.expand(B), block_table, k_rows, v_rows),
        choose("commit_kv", backend, HAS, path),
    )


def _expect_caches(
    name: str, caches: Any, B: int, paged: bool, device: torch.device
) -> list[Tensor]:
    """The schema's list: a tensor a layer [.., .., Hkv, D], or the one stacked tensor."""
    each = "[num_pages, page_size, Hkv, D]" if paged else "[B, S, Hkv, D]"
    stacked = isinstance(caches, Tensor)
    if not stacked and (not isinstance(caches, Sequence) or not caches):
        got = "an empty one" if isinstance(caches, Sequence) else type(caches).__name__
        raise TypeError(f"{name}: expected a sequence of tensors, one a layer, got {got}")
    tensors = [expect_tensor(name, x) for x in ([caches] if stacked else caches)]
    for x in tensors:
        expect_dim(name, x, 4 + stacked, each.replace("[", "[layers, ") if stacked else each)
        expect_shape(name, x, tensors[0].shape, "that of the first layer")
        expect_dtype(name, x, (*FLOATS, *FP8) if x is tensors[0] else (tensors[0].dtype,))
        expect_device(name, x, device)
        expect_last_contiguous(name, x)
        expect_writable(name, x)
    if not paged and tensors[0].shape[-4] != B:
        raise ValueError(
            f"{name}: expected {B} requests {each} as path has, got {tensors[0].shape[-4]}; "
            f"paged caches need a block_table"
        )
    return tensors


def _expect_alike(k_list: list[Tensor], v_list: list[Tensor]) -> None:
    k, v = k_list[0], v_list[0]
    if len(k_list) != len(v_list) or k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"v_caches: expected the layers and shape of k_caches but for Dv, {len(k_list)} x "
            f"{list(k.shape)}, got {len(v_list)} x {list(v.shape)}"
        )


def _expect_source(
    source: Any, k_list: list[Tensor], v_list: list[Tensor], B: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    if source is None:
        return None, None
    if not isinstance(source, (tuple, list)) or len(source) != 2:
        raise TypeError(f"source: expected None or (k_rows, v_rows), got {type(source).__name__}")
    stacked = k_list[0].dim() == 5
    num_layers = k_list[0].shape[0] if stacked else len(k_list)
    checked: list[Tensor] = []
    for i, (x, cache) in enumerate(zip(source, (k_list[0], v_list[0]))):
        x = expect_tensor(f"source[{i}]", x)
        symbols = "[layers, B, N, Hkv, D]"
        expect_dim(f"source[{i}]", x, 5, symbols)
        N = (checked[0] if checked else x).shape[2]
        expect_shape(f"source[{i}]", x, (num_layers, B, N, *cache.shape[-2:]), symbols)
        expect_dtype(f"source[{i}]", x, (cache.dtype,))
        expect_device(f"source[{i}]", x, device)
        expect_last_contiguous(f"source[{i}]", x)
        checked.append(x)
    return checked[0], checked[1]


def _check_paths(
    path: Tensor,
    num_accepted: Tensor,
    cache_seqlens: Tensor,
    k_list: list[Tensor],
    block_table: Tensor | None,
    k_rows: Tensor | None,
) -> None:
    """``pydecode.checks(True)``: every decided request has a good path."""
    if path.numel() == 0:
        return
    page_size, width = k_list[0].shape[-3], 1 if block_table is None else block_table.shape[1]
    num_rows = reference.MAX_ROWS if k_rows is None else k_rows.shape[2]
    good = reference.good_paths(
        *(path, num_accepted, cache_seqlens, page_size * width),
        num_rows=num_rows,
        staged=k_rows is not None,
    )
    bad = ((path[:, 0] >= 0) & ~good).nonzero()
    if bad.numel():
        b = int(bad[0, 0])
        raise ValueError(
            f"path: expected 0 = path[b, 0] < ... < path[b, num_accepted] < {num_rows} inside the "
            f"cache of {page_size * width} positions, got {path[b].tolist()} with num_accepted "
            f"{int(num_accepted[b])} at length {int(cache_seqlens[b])} at index {[b]}"
        )
    if block_table is not None:
        n = num_accepted.long()
        last = n if k_rows is not None else path.long().gather(1, n.clamp(min=0)[:, None])[:, 0]
        first = torch.arange(width, device=path.device) * page_size
        used = (first + page_size > cache_seqlens[:, None]) & (
            first <= (cache_seqlens + last)[:, None]
        )
        data_range("block_table", block_table, 0, k_list[0].shape[-4], used & good[:, None])


def _run(*args: Any) -> Tensor:
    *args, backend = args  # type: ignore[assignment]
    if backend == "reference":
        return reference.commit_kv(*args)
    if backend == "triton":
        from .triton_kernels import commit_kv as triton

        return triton.commit_kv(*args)
    raise unavailable("commit_kv", backend, HAS)


def _fake(
    k_caches: list[Tensor], v_caches: list[Tensor], path: Tensor, num_accepted: Tensor, *args: Any
) -> Tensor:
    return path.new_empty(path.shape[0], dtype=args[0].dtype)


_op = binding.bind("commit_kv", _run, _fake)
