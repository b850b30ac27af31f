"""write_kv in Triton, interpreted: the reference's very bits, and no other bit of the pool."""

from typing import Any

import pytest
import test_write_kv as cases
import torch
import triton
import triton.language as tl
from cache_layouts import LAYOUTS, assert_same_bits, make_pool, make_table
from pydecode.triton_kernels import write_kv as module
from pydecode.triton_kernels.numerics import decoded, encoded, rounded
from torch import Tensor

import pydecode
from pydecode.reference import write_kv as reference_module

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FORMS = {E4M3: 1, E5M2: 2}
reference = reference_module.write_kv


@pytest.fixture(autouse=True)
def _nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("the reference was called")

    monkeypatch.setattr(reference_module, "write_kv", refuse)


@pytest.mark.parametrize("page_size", [3, None])
@pytest.mark.parametrize(("layout", "dtype"), [*zip(LAYOUTS, [BF16, FP16, FP32, BF16])])
def test_every_bit(layout: str, dtype: torch.dtype, page_size: int | None) -> None:
    cases.test_every_bit_of_the_pool("triton", page_size, layout, dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("R", "dtype"), [(0, BF16), (4, FP16), (8, BF16), (6, FP32)])
def test_rope(R: int, dtype: torch.dtype, interleaved: bool) -> None:
    cases.test_rope_is_a_complex_rotation("triton", dtype, R, interleaved)


@pytest.mark.parametrize("dtype", FORMS)
@pytest.mark.parametrize("scale", [None, 0.25, "0d", "heads", "requests"])
def test_fp8(dtype: torch.dtype, scale: float | str | None) -> None:
    cases.test_fp8_takes_the_nearest_value_saturated("triton", dtype, scale)


def test_same_slot() -> None:
    cases.test_same_slot_the_last_row_wins("triton")


def special(x: Tensor) -> Tensor:
    """Zeros, infinities, huge and tiny numbers among the values."""
    values = [0.0, -0.0, torch.inf, -torch.inf, 3e38, -1e-40, 448.0, 464.0, 57344.0, 61440.0]
    drawn = torch.tensor(values)[torch.randint(0, len(values), x.shape)]
    return torch.where(torch.rand(x.shape) < 0.1, drawn, x.float() * 10 ** (torch.rand(()) * 4 - 2))


def same_numbers(got: Tensor, want: Tensor) -> None:
    """The same bits, and NaN for NaN."""
    nan = want.float().isnan()
    assert torch.equal(got.float().isnan(), nan)
    as_bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.element_size()]
    different = (got.view(as_bits) != want.view(as_bits)) & ~nan
    assert not different.any(), different.nonzero()[0]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("cache", [None, E4M3, E5M2], ids=str)
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=str)
def test_the_bits_of_the_reference(
    dtype: torch.dtype, cache: torch.dtype | None, interleaved: bool
) -> None:
    """Rotation, scale and cast, all rounded as the reference rounds; odd sizes and strides."""
    for D, half, Hkv, Hq in ((20, 7, 3, 40), (16, 8, 33, 6), (80, 40, 1, 2)):
        B, N = 2, 3
        k, v, q = (
            special(torch.randn(B, N, h, d + 3)).to(dtype)[..., :d]
            for h, d in ((Hkv, D), (Hkv, 12), (Hq, D))
        )
        angle = torch.rand(B, N, half) * 9
        cos, sin = angle.cos().to(BF16), angle.sin().to(BF16)
        scales = (0.3, None) if interleaved else (1.0, torch.rand(B, Hkv) + 0.2)
        pool = make_pool("hnd", 9, 2, Hkv, (D, 12), cache or dtype)
        want, table = pool.clone(), make_table(B, 4, 9)
        at = torch.stack([torch.randperm(10)[:N] for _ in range(B)]) - 1
        args = (at, table, cos, sin, interleaved, q, *scales, *scales[::-1][::-1])
        q_want = reference(k, v, want.k[0], want.v[0], *args)
        q_got = module.write_kv(k, v, pool.k[0], pool.v[0], *args)
        same_numbers(q_got, q_want)
        same_numbers(pool.k[0].contiguous(), want.k[0].contiguous())
        same_numbers(pool.v[0].contiguous(), want.v[0].contiguous())
        written = want.buffer.clone()  # around them nothing moved
        for x, like in ((pool, want.clone()), (want, want.clone())):
            like.k[0].view(torch.uint8 if cache else dtype).zero_()
            like.v[0].view(torch.uint8 if cache else dtype).zero_()
            x.k[0].view(torch.uint8 if cache else dtype).zero_()
            x.v[0].view(torch.uint8 if cache else dtype).zero_()
        assert_same_bits(pool.buffer, want.buffer)
        assert written.numel()


def test_without_a_change_bits_are_copied() -> None:
    """NaN payloads and signed zeros of k, v and q."""
    bits = torch.randint(-(2**15), 2**15, (3, 1, 4, 2, 16), dtype=torch.int16)
    bits[:, 0, 0, 0, :4] = torch.tensor([0x7FC1, -64, 0x7F81, -32768])
    k, v, q = bits.view(BF16)
    cache = torch.zeros(2, 1, 4, 2, 16, dtype=BF16)
    at = torch.arange(4)[None]
    out = pydecode.write_kv(k, v, *cache, positions=at, q=q, backend="triton")
    assert out is not None
    assert_same_bits(torch.stack([*cache, out]), torch.stack([k, v, q]))


def test_nothing_to_write() -> None:
    k, cache = torch.randn(2, 3, 1, 4), torch.randn(2, 2, 5, 1, 4)
    before, call = cache.clone(), dict(backend="triton")
    out = pydecode.write_kv(
        *(k, k, *cache), positions=torch.full((2, 3), -1), q=k[..., :0, :], **call
    )
    assert out is not None
    assert out.shape == (2, 3, 0, 4)
    at = torch.zeros(2, 3, dtype=torch.int32)
    no_pages, no_table = torch.zeros(0, 5, 1, 4), torch.zeros(2, 0, dtype=torch.int32)
    table = torch.zeros(2, 1, dtype=torch.int32)
    out = pydecode.write_kv(
        *(k, k, no_pages, no_pages), positions=at, block_table=table, q=k, **call
    )
    assert torch.equal(out, k)  # type: ignore[arg-type]
    pydecode.write_kv(k, k, *cache, positions=at, block_table=no_table, **call)
    pydecode.write_kv(k[:, :0], k[:, :0], *cache, positions=at[:, :0], **call)
    pydecode.write_kv(k[:0], k[:0], *cache[:, :0], positions=at[:0], **call)
    assert_same_bits(cache, before)


def test_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []

    class Counted:
        def __getitem__(self, grid: Any) -> Any:
            launches.append(grid)
            return real[grid]

    real = module.write
    monkeypatch.setattr(module, "write", Counted())
    k, q = torch.randn(2, 3, 9, 16), torch.randn(2, 3, 70, 16)
    cache, angle = torch.zeros(2, 2, 5, 9, 16), torch.rand(2, 3, 8)
    pydecode.write_kv(
        *(k, k, *cache),
        **dict(positions=torch.zeros(2, 3, dtype=torch.int64), cos=angle, sin=angle, q=q),
        backend="triton",
    )
    assert len(launches) == 1


# ---- fp8 by integer operations ------------------------------------------------------------------


@triton.jit
def casts(x, out, n, FORM: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.load(x + i, mask=i < n, other=0)
    if FORM < 0:
        tl.store(out + i, decoded(b, -FORM, tl.float32), mask=i < n)
    elif FORM == 0:
        tl.store(out + i, rounded(b, out.dtype.element_ty), mask=i < n)
    else:
        tl.store(out + i, encoded(b, FORM), mask=i < n)


def cast(x: Tensor, dtype: torch.dtype, form: int) -> Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    casts[(-(-x.numel() // 2**18),)](x, out, x.numel(), form, 2**18)
    return out


@pytest.mark.parametrize("dtype", FORMS)
def test_all_codes_go_round(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values = cast(codes, FP32, -FORMS[dtype])
    exact = codes.view(dtype).float()
    torch.testing.assert_close(values, exact, rtol=0, atol=0, equal_nan=True)
    back = cast(values, torch.uint8, FORMS[dtype])
    finite = exact.isfinite()
    assert torch.equal(back[finite], codes[finite])
    assert back[~finite].view(dtype).float().isnan().tolist() == exact[
        ~finite
    ].isnan().tolist() or (
        dtype == E5M2  # whose infinities saturate
    )


@pytest.mark.parametrize("dtype", FORMS)
def test_rounds_to_the_nearest_as_torch_does(dtype: torch.dtype) -> None:
    """Every code, every half way between two, what lies next to them, and a comb of all floats."""
    table = torch.arange(128, dtype=torch.uint8).view(dtype).double()
    table = table[table.isfinite()]
    halves = torch.cat([table, (table[1:] + table[:-1]) / 2]).float()
    near = halves.view(torch.int32)[:, None] + torch.arange(-2, 3)
    comb = torch.arange(-(2**31), 2**31, 7919 + int(torch.randint(0, 997, ())))
    bits = torch.cat([near.flatten().clamp(min=0), comb.to(torch.int32)])
    x = bits.view(torch.float32)
    x = torch.cat([x, -x, torch.tensor([torch.inf, -torch.inf, torch.nan, -torch.nan, 0.0, -0.0])])
    largest = torch.finfo(dtype).max
    want = x.clamp(-largest, largest).to(dtype).view(torch.uint8)
    assert torch.equal(cast(x, torch.uint8, FORMS[dtype]), want)
    if dtype == E4M3:
        same_numbers(cast(x, BF16, 0), x.to(BF16))
