"""write_kv against plain loops over slots: every other bit of the pool's buffer must stay."""

import pytest
import torch
from cache_layouts import LAYOUTS, assert_same_bits, make_pool, make_table, slot_of
from torch import Tensor

import pydecode

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
B, N, H, D, DV = 3, 4, 2, 8, 6


def rows(dtype: torch.dtype = torch.float32, heads: int = H, dim: int = D) -> Tensor:
    return torch.randn(B, N, heads, dim, dtype=torch.float64).to(dtype)


def distinct_positions(capacity: int) -> Tensor:
    """Ragged rows: most are slots of the request, some negative or past the capacity."""
    positions = torch.stack([torch.randperm(capacity)[:N] for _ in range(B)])
    positions[0, 1], positions[1, 0], positions[2, 2] = -1, capacity, capacity + 10**9
    positions[2, 3] = -(2**31)
    return positions


def put(cache: Tensor, table: Tensor | None, positions: Tensor, values: Tensor) -> None:
    """The oracle: a double loop, in order."""
    for b in range(positions.shape[0]):
        for n in range(positions.shape[1]):
            at = slot_of(cache, table, b, int(positions[b, n]))
            if at is not None:
                cache.view(torch.uint8 if cache.element_size() == 1 else cache.dtype)[at] = (
                    values[b, n].view(torch.uint8) if cache.element_size() == 1 else values[b, n]
                )


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """RoPE as complex numbers, fp64."""
    x, R = x.double().clone(), 2 * cos.shape[-1]
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + R // 2) for i in range(R // 2)]
    for c, (i, j) in enumerate(pairs):
        turn = torch.complex(cos[..., c].double(), sin[..., c].double())[:, :, None]
        z = torch.complex(x[..., i], x[..., j]) * turn
        x[..., i], x[..., j] = z.real, z.imag
    return x


def assert_rounded_once(got: Tensor, exact: Tensor, size: float) -> None:
    """Within half a unit in the last place of the dtype, plus fp32's own error."""
    bound = exact.abs() * torch.finfo(got.dtype).eps / 2 * 1.001
    if got.dtype == torch.float16:
        bound = bound + 2**-25  # half a subnormal
    compute = torch.finfo(torch.float64 if got.dtype == torch.float64 else torch.float32).eps
    assert ((got.double() - exact).abs() <= bound + 4 * compute * size).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size", [1, 3, 16, None])
def test_every_bit_of_the_pool(
    backend: str, page_size: int | None, layout: str, dtype: torch.dtype
) -> None:
    # page_size None: no table, [B, S, H, D]
    shape = (B, 7) if page_size is None else (23, page_size)
    pool = make_pool(layout, *shape, H, (D, DV), dtype)
    width = 7 if page_size == 1 else 3
    table = None if page_size is None else make_table(B, width, 23)
    capacity = 7 if page_size is None else width * page_size
    positions = distinct_positions(capacity)
    if table is not None:  # pages of used positions that are not in the pool
        table[0, int(positions[0, 0]) // shape[1]] = 23
        table[1, int(positions[1, 1]) // shape[1]] = -1
        table[2, int(positions[2, 0]) // shape[1]] = 2**31 - 1
    k, v = rows(dtype), rows(dtype, dim=DV)
    k[0, 2, 0, 0], v[1, 2, 1, 1] = torch.nan, torch.inf
    want = pool.clone()
    put(want.k[0], table, positions, k)
    put(want.v[0], table, positions, v)
    for positions in (positions, positions.clamp(max=2**31 - 1).int()):  # noqa: B020
        result = pydecode.write_kv(
            *(k, v, pool.k[0], pool.v[0]), positions=positions, block_table=table, backend=backend
        )
        assert result is None
        assert_same_bits(pool.buffer, want.buffer)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("R", [0, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_is_a_complex_rotation(
    backend: str, dtype: torch.dtype, R: int, interleaved: bool
) -> None:
    pool = make_pool("hnd", 9, 4, H, (D, DV), dtype)
    before, table, positions = pool.clone(), make_table(B, 3, 9), distinct_positions(12)
    angle = torch.rand(B, N, R // 2, dtype=torch.float64) * 7
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    k, v, q = rows(dtype), rows(dtype, dim=DV), rows(dtype, heads=6)
    q_before = q.clone()
    q_out = pydecode.write_kv(
        *(k, v, pool.k[0], pool.v[0]),
        **dict(positions=positions, block_table=table, cos=cos, sin=sin, interleaved=interleaved),
        **dict(q=q, backend=backend),
    )
    assert q_out is not None
    assert_same_bits(q, q_before)
    assert q_out.dtype == dtype
    assert q_out.is_contiguous()
    assert_rounded_once(q_out, rotated(q, cos, sin, interleaved), 8.0)
    k_exact = rotated(k, cos, sin, interleaved)
    for b in range(B):
        for n in range(N):
            at = slot_of(pool.k[0], table, b, int(positions[b, n]))
            if at is not None:
                assert_rounded_once(pool.k[0][at], k_exact[b, n], 8.0)
                before.k[0][at] = pool.k[0][at]
                before.v[0][at] = v[b, n]
    assert_same_bits(pool.buffer, before.buffer)  # v is never rotated, nothing else is touched


@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.parametrize("scale", [None, 0.25, "0d", "heads", "requests"])
def test_fp8_takes_the_nearest_value_saturated(
    backend: str, dtype: torch.dtype, scale: float | str | None
) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    table = codes.view(dtype).float()
    table[~table.isfinite()] = torch.nan
    shapes = {"0d": (), "heads": (H,), "requests": (B, H)}
    tensor = torch.rand(shapes[scale]) + 0.5 if isinstance(scale, str) else scale
    k = (
        rows(torch.bfloat16)
        * torch.tensor([1e-6, 0.01, 1.0, 1e5], dtype=torch.bfloat16)[:, None, None]
    )
    k[0, 0, 0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
    divisor = torch.as_tensor(1.0 if tensor is None else tensor).expand(B, H)[:, None, :, None]
    exact = (k.float() / divisor).double()
    largest = table.nan_to_num().max()
    distance = (exact[..., None].clamp(-largest, largest) - table).abs().nan_to_num(torch.inf)
    nearest = distance == distance.amin(-1, keepdim=True)
    even_first = codes.long() % 2 * 256 + codes.long()  # ties go to the even code
    want = table[torch.where(nearest, even_first, 511).amin(-1) % 256]
    want = torch.where(exact.isnan(), torch.nan, want)

    pool = make_pool("nhd", 5, 4, H, (D, DV), dtype)
    v_cache = torch.zeros(5, 4, H, DV, dtype=torch.bfloat16)
    block_table = make_table(B, 1, 5)
    positions = torch.arange(4).expand(B, 4)
    before = pool.clone()
    pydecode.write_kv(
        *(k, rows(torch.bfloat16, dim=DV), pool.k[0], v_cache),
        **dict(positions=positions, block_table=block_table, k_scale=tensor, backend=backend),
    )
    got = pool.k[0][block_table.long()[:, 0]].float()
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    put(before.k[0], block_table, positions, pool.k[0][block_table.long()[:, 0]])
    assert_same_bits(pool.buffer, before.buffer)


def test_scales_round_trip_through_attention(backend: str) -> None:
    """value = stored * scale, whatever the cache's dtype: what was written is what is attended."""
    k, v, q = rows(torch.float64), rows(torch.float64), rows(torch.float64)
    k_scale, v_scale = torch.tensor([0.5, 4.0]), torch.rand(B, H) + 0.5
    cache = torch.full((2, B, N, H, D), torch.nan, dtype=torch.float64)
    positions = torch.arange(N).expand(B, N)
    pydecode.write_kv(
        k, v, *cache, positions=positions, k_scale=k_scale, v_scale=v_scale, backend=backend
    )
    got = pydecode.tree_attention(
        q, *cache, mask="causal", cache_seqlens=0, k_scale=k_scale, v_scale=v_scale
    )
    want = pydecode.tree_attention(q, *cache, k, v, mask="causal", cache_seqlens=0)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_same_slot_the_last_row_wins(backend: str) -> None:
    k = rows()
    cache = torch.zeros(1, 5, H, D)
    table = torch.zeros(B, 1, dtype=torch.int64)  # all requests share the page
    positions = torch.tensor([[3, -1, 3, 0], [2, 0, -1, 9], [0, 4, 0, -5]])
    v_cache = torch.zeros_like(cache)
    pydecode.write_kv(k, k, cache, v_cache, positions=positions, block_table=table, backend=backend)
    want = torch.zeros_like(cache)
    put(want, table, positions, k)
    assert_same_bits(cache, want)
    assert_same_bits(v_cache, want)


def test_nothing_to_write(backend: str) -> None:
    pool = make_pool("padded", 4, 3, H, (D, DV), torch.bfloat16)
    before = pool.buffer.clone()
    k, v, q = rows(torch.bfloat16), rows(torch.bfloat16, dim=DV), rows(torch.bfloat16)
    table = make_table(B, 1, 4)
    q_out = pydecode.write_kv(
        *(k, v, pool.k[0], pool.v[0]),
        **dict(positions=torch.full((B, N), -1), block_table=table, q=q, backend=backend),
    )
    assert q_out is not None
    assert_same_bits(q_out, q)
    assert q_out.data_ptr() != q.data_ptr()
    empty = torch.zeros(B, 0, dtype=torch.int64)
    pydecode.write_kv(
        *(k[:, :0], v[:, :0], pool.k[0], pool.v[0]), positions=empty, block_table=table
    )  # N = 0
    no_table = torch.zeros(B, 0, dtype=torch.int64)
    positions = torch.zeros(B, N, dtype=torch.int64)
    pydecode.write_kv(k, v, pool.k[0], pool.v[0], positions=positions, block_table=no_table)
    pydecode.write_kv(
        *(k, v, pool.k[0][:0], pool.v[0][:0]), positions=positions, block_table=table
    )  # no pages
    pydecode.write_kv(k[:0], v[:0], pool.k[0][:0], pool.v[0][:0], positions=positions[:0])  # B = 0
    assert_same_bits(pool.buffer, before)


def test_scale_of_a_request_alone_equals_the_batch(backend: str) -> None:
    k, scale = rows(torch.bfloat16), torch.rand(B, H) + 0.5
    angle = torch.rand(B, N, 3)
    together = torch.zeros(2, B, 6, H, D, dtype=torch.float8_e4m3fn)
    positions = torch.stack([torch.randperm(6)[:N] for _ in range(B)])
    options = dict(k_scale=scale, cos=angle.cos(), sin=angle.sin(), q=rows(torch.bfloat16, 4))
    q_all = pydecode.write_kv(k, k, *together, positions=positions, **options, backend=backend)
    for b in range(B):
        alone = torch.zeros(2, 1, 6, H, D, dtype=torch.float8_e4m3fn)
        one = {name: x[b : b + 1] for name, x in options.items()}
        q_one = pydecode.write_kv(
            *(k[b : b + 1], k[b : b + 1], *alone), positions=positions[b : b + 1], **one
        )
        assert_same_bits(alone[:, 0].view(torch.uint8), together[:, b].view(torch.uint8))
        assert_same_bits(q_one[0], q_all[b])
