"""Writing K/V into the cache: the public function, its checks and its binding."""

from typing import Any

import torch
from torch import Tensor

from . import attention_arguments as arguments
from . import binding
from .backends import choose, unavailable
from .reference import write_kv as reference
from .replay import replayed
from .validation import (
    FLOATS,
    checking,
    data_at_most,
    data_range,
    expect_device,
    expect_dim,
    expect_dtype,
    expect_index,
    expect_last_contiguous,
    expect_shape,
    expect_tensor,
)

HAS = ("reference", "triton")


@replayed
def write_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    positions: Tensor,
    block_table: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    q: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor | None:
    """Writes the rows' keys and values into their cache slots, in place; rotates k (and q) first.

    ``k_cache[slot(positions[b, n])] = rope(k[b, n]) / k_scale`` and the same for v, which is never
    rotated. RoPE (Su et al., RoFormer, 2021, section 3.4.2) turns each pair (x1, x2) of the first R
    dims into (x1 cos - x2 sin, x1 sin + x2 cos), in fp32 (fp64 for fp64), rounded once at the end.

    Args:
        k: [B, N, Hkv, D], fp16, bf16, fp32 or fp64. v: [B, N, Hkv, Dv], k's dtype.
        k_cache: [num_pages, page_size, Hkv, D] with a ``block_table``, else [B, S, Hkv, D]; k's
            dtype, or fp8 e4m3/e5m2. Any strides but the last (HND, or K and V interleaved in one
            tensor, are views). v_cache: the same with Dv. Both are **mutated**.
        positions: [B, N] int32/int64, cache slots of the request: a tree's node i goes to
            cache_seqlens[b] + i. A row whose position is negative or past the capacity, or whose
            page lies outside the pool, is not written.
        block_table: [B, max_pages] int32/int64.
        cos, sin: [B, N, R/2] with R <= D, any float dtype, looked up at each row's own rotary
            position (a tree node's is cache_seqlens[b] + its depth, not its slot).
        interleaved: pairs are (2i, 2i + 1) (GPT-J); default (i, i + R/2) (NeoX, Llama).
        q: [B, N, Hq, D], k's dtype: rotated like k and returned.
        k_scale, v_scale: number or fp32 0-d, [Hkv] or [B, Hkv]: value = stored * scale, whatever
            the cache's dtype. fp8 stores value / scale saturated to the largest finite value; NaN
            stays NaN.

    Returns:
        q rotated, a fresh tensor (a copy without cos and sin), or None without q.

    Two rows of one call with the same slot: on the CPU and in the reference the last one wins; on a
    GPU any of them may, head by head. Every other bit of the cache stays as it was. k, v and q must
    not share memory with the caches.

    Raises:
        ValueError, TypeError: a shape, dtype, device or stride that does not fit, by name.
        BackendUnavailable: the named backend cannot run this call.

    >>> import torch, pydecode
    >>> kv, cache = torch.ones(1, 2, 1, 4), torch.zeros(2, 1, 8, 1, 4)
    >>> pydecode.write_kv(kv, kv, cache[0], cache[1], positions=torch.tensor([[5, -1]]))
    >>> cache[0].sum(-1).flatten().tolist()
    [0.0, 0.0, 0.0, 0.0, 0.0, 4.0, 0.0, 0.0]
    """
    k = expect_tensor("k", k)
    expect_dtype("k", k, FLOATS)
    expect_last_contiguous("k", k)
    expect_dim("k", k, 4, "[B, N, Hkv, D]")
    B, N, Hkv, D = k.shape
    v = expect_tensor("v", v)
    expect_dim("v", v, 4, "[B, N, Hkv, Dv]")
    v = arguments.expect_rows("v", v, k, (B, N, Hkv, v.shape[-1]), "[B, N, Hkv, Dv]")
    k_cache, v_cache, cache_heads, Dv, capacity = arguments.expect_cache(
        k, k_cache, v_cache, block_table, B, Hkv, D
    )
    if cache_heads != Hkv:
        raise ValueError(f"k_cache: expected Hkv = {Hkv} heads as k has, got {cache_heads}")
    if Dv != v.shape[-1]:
        raise ValueError(f"v_cache: expected head dim Dv = {v.shape[-1]} as v has, got {Dv}")
    expect_writable("k_cache", k_cache)
    expect_writable("v_cache", v_cache)
    positions = expect_index("positions", positions, (B, N), "[B, N]", k.device)
    cos, sin = _expect_rotation(cos, sin, k)
    if q is not None:
        q = expect_tensor("q", q)
        expect_dim("q", q, 4, "[B, N, Hq, D]")
        q = arguments.expect_rows("q", q, k, (B, N, q.shape[2], D), "[B, N, Hq, D]")
    if checking():
        data_at_most("positions", positions, capacity - 1, f"expected below {capacity}")
        if block_table is not None and capacity:
            page = block_table.gather(1, positions.long().clamp(min=0) // k_cache.shape[1])
            data_range("block_table", page, 0, k_cache.shape[0], positions >= 0)
    result = binding.call(
        _op,
        _run,
        *(k, v, k_cache, v_cache, positions, block_table, cos, sin, bool(interleaved), q),
        *arguments.cache_scale("k_scale", k_scale, B, Hkv, k.device),
        *arguments.cache_scale("v_scale", v_scale, B, Hkv, k.device),
        choose("write_kv", backend, HAS, k),
    )
    return None if q is None else result


def expect_writable(name: str, cache: Tensor) -> None:
    """No two entries of a mutated cache may be the same memory by a stride of 0."""
    if any(n > 1 and stride == 0 for n, stride in zip(cache.shape, cache.stride())):
        raise ValueError(
            f"{name}: expected a cache without stride 0 (it is written), got strides "
            f"{list(cache.stride())}"
        )


def _expect_rotation(cos: Any, sin: Any, k: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if (cos is None) != (sin is None):
        raise ValueError("cos, sin: expected both or neither, got one of them")
    if cos is None:
        return None, None
    cos, sin = expect_tensor("cos", cos), expect_tensor("sin", sin)
    B, N, _, D = k.shape
    expect_dim("cos", cos, 3, "[B, N, R/2]")
    for name, x in (("cos", cos), ("sin", sin)):
        expect_dtype(name, x, FLOATS)
        expect_shape(name, x, (B, N, cos.shape[-1]), "[B, N, R/2]")
        expect_device(name, x, k.device)
    if 2 * cos.shape[-1] > D:
        raise ValueError(f"cos: expected R <= D = {D}, got R = {2 * cos.shape[-1]}")
    return cos, sin


def _run(*args: Any) -> Tensor:
    *args, backend = args  # type: ignore[assignment]
    if backend == "reference":
        return reference.write_kv(*args)
    if backend == "triton":
        from .triton_kernels import write_kv as triton

        return triton.write_kv(*args)
    raise unavailable("write_kv", backend, HAS)


def _fake(*args: Any) -> Tensor:
    k, q = args[0], args[9]
    return k.new_empty(0) if q is None else torch.empty(q.shape, dtype=q.dtype, device=q.device)


_op = binding.bind("write_kv", _run, _fake)
