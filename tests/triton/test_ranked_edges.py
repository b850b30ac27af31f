"""Ranked attention in Triton: which tiles are taken, launches, hostile and odd metadata."""

import functools
from typing import Any

import attention_calls
import pytest
import torch
from attention_calls import cumulative, packed
from examples import EXAMPLES
from oracle_attention import verify
from torch import Tensor

import pydecode
from pydecode import ranks
from pydecode.check.compare import same_bits

OP = "ranked_attention"
# heads of 8 would all have the small tiles of odd strides
make = functools.partial(attention_calls.make, Dv=16)
FP32 = torch.float32


def call(args: list[Any], kwargs: dict[str, Any], backend: str = "triton") -> tuple[Tensor, Tensor]:
    return pydecode.ranked_attention(*args, **kwargs, return_lse=True, backend=backend)


def close(args: list[Any], kwargs: dict[str, Any]) -> None:
    for x, y in zip(call(args, kwargs), call(args, kwargs, "reference")):
        torch.testing.assert_close(x, y)


def test_the_example_runs() -> None:
    function, args, kwargs = EXAMPLES[OP]()
    function(*args, **kwargs, backend="triton")


def lists_of(rank: Tensor, monkeypatch: pytest.MonkeyPatch, **more: Any) -> list[tuple]:
    """(full, partial) tiles of keys of each tile of queries, as ``plan`` leaves them."""
    from pydecode.triton_kernels import ranked_attention as module

    made: list[Any] = []
    launches = module.launches

    def noted(*args: Any) -> Any:
        made.append(launches(*args))
        return made[0]

    monkeypatch.setattr(module, "launches", noted)
    N = rank.shape[1]
    x = torch.randn(1, N, 1, 16)
    call([x, x, x], dict(q_rank=rank, k_rank=rank, **more))
    given = made[0][2][0][3]
    width = given["tiles_k"] + 4
    rows = given["lists"].view(-1, width).tolist()
    return [(row[: row[-4]], row[width - 4 - row[-3] : -4][::-1]) for row in rows]


KINDS = {
    "causal": ranks.causal,
    "bidirectional": lambda n: ranks.bidirectional([n], n),
    "blocks": lambda n: ranks.block_causal(n, 48),
    "scattered": lambda n: torch.randperm(n)[None].int() // 40,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [None, 50])
def test_tiles_are_skipped_full_or_partial(
    kind: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By brute force over the pairs; what the second kernel never hears of costs it nothing."""
    from pydecode.triton_kernels.ranked_attention import CONFIGURATIONS, key_of

    N = 130
    rank = KINDS[kind](N)
    entry = CONFIGURATIONS[key_of(FP32, True, 16, N, "sm_90")]
    sees = rank[0, None, :] <= rank[0, :, None]
    if window:
        i = torch.arange(N)
        sees &= i[None, :] > i[:, None] - window
    got = lists_of(rank, monkeypatch, window_size=window)
    assert len(got) == -(-N // entry["BM"])
    for tile, (full, partial) in enumerate(got):
        rows = sees[tile * entry["BM"] :][: entry["BM"]]
        parts = [rows[:, t : t + entry["BN"]] for t in range(0, N, entry["BN"])]
        whole = [p.shape[1] == entry["BN"] and bool(p.all()) for p in parts]
        if window or kind == "scattered":  # bounds, so a visible tile may count as partial
            assert set(full) <= {t for t, w in enumerate(whole) if w}
            assert {t for t, p in enumerate(parts) if p.any()} <= {*full, *partial}
        else:
            assert full == [t for t, w in enumerate(whole) if w]
            assert partial == [t for t, p in enumerate(parts) if p.any() and not whole[t]]


def test_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    from pydecode.triton_kernels import ranked_attention as module

    count: list[str] = []

    class Counted:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: Any) -> Any:
            count.append(self.name)
            return self.kernel[grid]

    for name in ("plan", "attend"):
        monkeypatch.setattr(module, name, Counted(name, getattr(module, name)))
    call(*make(OP, dtype=FP32))
    assert count == ["plan", "attend"]
    count.clear()
    args, kwargs = make(OP, dtype=FP32, mask=torch.rand(3, 5, 16) < 0.5, window_size=3)
    args[0], kwargs["q_rank"] = args[0].flatten(0, 1), kwargs["q_rank"].flatten()
    kwargs |= dict(cu_seqlens_q=cumulative([5, 5, 5]), max_seqlen_q=5, mask=kwargs["mask"][0])
    kwargs["mask"] = kwargs["mask"].repeat(3, 1)
    call(args, kwargs)
    assert count == ["plan", "attend"]


@pytest.mark.parametrize(
    "bounds",
    [[0, 5, 3, 9], [-4, 2, 4, 99], [2, 2, 30, 9], [4, 9, 0, 4], [0, 4, 2**40, 9], [0, 0, 0, 0]],
    ids=str,
)
def test_packed_lengths_that_overlap_or_point_outside(bounds: list[int]) -> None:
    args, kwargs = make(OP, dtype=FP32)
    args[0], kwargs["q_rank"] = args[0].flatten(0, 1)[:9], kwargs["q_rank"].flatten()[:9]
    close(args, kwargs | dict(cu_seqlens_q=torch.tensor(bounds), max_seqlen_q=5))


def test_requests_that_claim_everything_many_times() -> None:
    """More tiles than a packed batch can have: the later requests' rows are the first one's."""
    N, B = 70, 9
    args, kwargs = make(OP, B, N, 1, 1, dtype=FP32)
    args[0], kwargs["q_rank"] = args[0][0], kwargs["q_rank"][0]
    bounds = torch.tensor([0, N] * (B // 2 + 1))
    close(args, kwargs | dict(cu_seqlens_q=bounds, max_seqlen_q=N))


def test_rows_whose_tile_a_packed_batch_cannot_have() -> None:
    """Four requests claim the first 64 rows and use up the tiles: the last one's are nobody's."""
    N, B = 70, 9
    args, kwargs = make(OP, B, N, 1, 1, dtype=FP32)
    args[0], kwargs["q_rank"] = args[0][0], kwargs["q_rank"][0]
    kwargs |= dict(cu_seqlens_q=torch.tensor([0, 64] * 4 + [64, N]), max_seqlen_q=N)
    (out, lse), want = call(args, kwargs), call(args, kwargs, "reference")
    torch.testing.assert_close(out[:64], want[0][:64])
    torch.testing.assert_close(lse[:, :64], want[1][:, :64])
    assert (out[64:] == 0).all()
    assert (lse[:, 64:] == -torch.inf).all()


def test_many_packed_requests() -> None:
    """More than are looked through at once, some longer than a tile, most without a row."""
    counts = [0, 3, 40] + [0] * 30 + [1, 0, 33, 2]
    args, kwargs = make(OP, len(counts), 40, 1, 1, dtype=FP32, paged=False, pages=6)
    lengths = [n // 2 + 1 for n in counts]
    args[0], kwargs["q_rank"] = packed(args[0], counts), packed(kwargs["q_rank"], counts)
    del kwargs["cache_seqlens"]
    args[1:] = [packed(x, lengths) for x in args[1:]]
    kwargs["k_rank"] = packed(kwargs["k_rank"], lengths)
    kwargs |= dict(cu_seqlens_q=cumulative(counts), max_seqlen_q=40)
    kwargs |= dict(cu_seqlens_k=cumulative(lengths), max_seqlen_k=21)
    verify(OP, args, kwargs, "triton")


def test_one_long_packed_request_costs_no_memory_of_the_others() -> None:
    from pydecode.triton_kernels import ranked_attention as module
    from pydecode.triton_kernels.ranked_static import example

    given = example(packed=True)
    q = torch.empty(9000, 32, 128, dtype=torch.bfloat16, device="meta")
    given |= dict(q=q, q_rank=given["q_rank"][:9000], max_seqlen_q=8999)
    _, _, (_, attend) = module.launches("sm_90", **given)
    BM = module.CONFIGURATIONS[attend[1]]["BM"]
    assert attend[2] == (9000 // BM + 8) * 32


def test_vectors_of_any_stride() -> None:
    """Tables, lengths, ranks, positions and sinks that are every second entry of something."""
    args, kwargs = make(OP, dtype=FP32, window_size=6, positions=torch.randint(0, 16, (3, 5)))
    kwargs["sinks"] = torch.randn(4)
    want = call(args, kwargs)
    spread = {
        name: torch.stack([x, x - 7], -1)[..., 0] if isinstance(x, Tensor) else x
        for name, x in kwargs.items()
    }
    assert all(map(same_bits, call(args, spread), want))


@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_fp8_code(fp8: torch.dtype) -> None:
    """One key, seen with weight 1: its value comes out as it is."""
    codes = torch.arange(256, dtype=torch.uint8).view(fp8)
    zero = torch.zeros(1, 1, dtype=torch.int32)
    for dtype in (FP32, torch.float16, torch.bfloat16):
        q = torch.zeros(1, 1, 1, 16, dtype=dtype)
        args = [q, q, codes.view(1, 1, 1, 256)]
        out, _ = call(args, dict(q_rank=zero, k_rank=zero))
        torch.testing.assert_close(
            out.flatten().float(), codes.float(), rtol=0, atol=0, equal_nan=True
        )


def test_what_it_cannot_run() -> None:
    with pytest.raises(pydecode.BackendUnavailable, match="fp32; the reference computes in fp64"):
        call(*make(OP))
    with pytest.raises(pydecode.BackendUnavailable, match="head dims up to 256, got 260"):
        call(*make(OP, D=260, dtype=FP32))
