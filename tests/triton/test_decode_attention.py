"""Tree, block and branch attention in Triton, interpreted, against the oracle's loops."""

from typing import Any

import pytest
import torch
from attention_calls import cumulative, make, packed, random_parents, tree_mask
from oracle_attention import verify

import pydecode
from pydecode.trees.masks import pack_bits

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
TREE, BLOCK, BRANCH = "tree_attention", "block_attention", "branch_attention"
OPS = (TREE, BLOCK, BRANCH)


@pytest.fixture(autouse=True)
def _nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels cannot borrow from the reference."""
    from pydecode import block_attention, branch_attention, tree_attention  # noqa: F401
    from pydecode.reference import attention

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the reference was called")

    monkeypatch.setattr(attention, "attend", refuse)


def test_backend_none_stays_with_the_reference_on_the_cpu() -> None:
    args, kwargs = make(TREE, dtype=FP32)
    with pytest.raises(AssertionError, match="the reference was called"):
        pydecode.tree_attention(*args, **kwargs)


# (N, Hq, Hkv, D, Dv, page size, dtype)
SIZES = [
    (1, 2, 1, 16, 16, 1, FP32),
    (3, 7, 1, 80, 80, 16, FP16),
    (33, 2, 2, 16, 24, 3, BF16),
    (64, 3, 1, 7, 1, 16, FP16),
    (65, 1, 1, 96, 64, 64, FP16),
    (5, 4, 2, 128, 128, 16, FP32),
    (4, 2, 1, 256, 128, 16, BF16),
    (3, 2, 1, 200, 72, 16, FP32),  # head dims in chunks, the last one cut
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(op: str, size: Any) -> None:
    N, Hq, Hkv, D, Dv, page_size, dtype = size
    N = min(N, 9) if op == BRANCH else N
    pages = max(2, 40 // page_size)
    more = dict(dtype=dtype, page_size=page_size, pages=pages)
    verify(op, *make(op, 2, N, Hq, Hkv, D, Dv, **more), "triton")


CASES: dict[str, dict[str, Any]] = {
    "dense": dict(paged=False),
    "hnd": dict(layout="HND"),
    "interleaved": dict(layout="interleaved", paged=False),
    "padded": dict(layout="padded"),
    "mqa": dict(Hq=5, Hkv=1),
    "negative_scale": dict(softmax_scale=-0.5),
    "scale_0": dict(softmax_scale=0.0),
    "softcap": dict(softcap=1.5),
    "sinks": dict(sinks=torch.tensor([0.5, -1.0, 2.0, -torch.inf])),
    "window": dict(window_size=3),
    "int_length": dict(cache_seqlens=6),
    "no_context": dict(cache_seqlens=0),
    "ragged": dict(num_tokens=torch.tensor([5, 0, 2])),
    "ragged_int": dict(num_tokens=3, sinks=torch.randn(4)),
    "zero_rows": dict(N=0),
    "zero_batch": dict(B=0),
    "no_pages": dict(pages=0, cache_seqlens=0),
}
OF_ONE: dict[str, dict[str, dict[str, Any]]] = {
    TREE: {
        "causal": dict(mask="causal", window_size=4),
        "bool": dict(mask=torch.rand(3, 5, 5) < 0.5, window_size=4),
        "in_cache": dict(own=False, mask="causal"),
        "positions": dict(positions=torch.randint(0, 20, (3, 5)), window_size=5),
    },
    BLOCK: {
        "hole": dict(replace_at=torch.tensor([3, -1, 8])),
        "hole_ragged": dict(replace_at=2, num_tokens=torch.tensor([5, 0, 2])),
        "starts": dict(cache_starts=torch.tensor([2, 0, 30]), replace_at=4),
        "causal": dict(causal=True, replace_at=4),
        "causal_each": dict(causal=torch.tensor([True, False, True]), replace_at=4),
        "causal_window": dict(causal=torch.tensor([True, False, True]), window_size=4),
        "mask": dict(mask=torch.rand(1, 5, 5) < 0.5),
        "in_cache": dict(own=False, cache_seqlens=torch.tensor([3, 0, 9])),
        "in_the_hole": dict(own=False, replace_at=3),
        "positions": dict(positions=torch.randint(0, 20, (3, 5)), window_size=5),
    },
    BRANCH: {
        "hole": dict(replace_at=torch.tensor([3, -1, 8])),
        "branches": dict(num_branches=torch.tensor([2, 0, 1])),
        "causal": dict(causal=True, num_tokens=torch.tensor([5, 1, 2])),
        "causal_each": dict(causal=torch.tensor([True, False, True]), window_size=6),
        "positions": dict(positions=torch.randint(0, 20, (3, 1, 5)), window_size=5),
    },
}


SHARED = ("dense", "hnd", "sinks", "window", "ragged", "zero_rows", "no_pages")  # for all three


@pytest.mark.parametrize(
    ("op", "case"),
    [(op, c) for op in OPS for c in (*(CASES if op == TREE else SHARED), *OF_ONE[op])],
    ids=str,
)
def test_cases(op: str, case: str) -> None:
    given = CASES.get(case) or OF_ONE[op][case]
    verify(op, *make(op, **{"dtype": FP32, "K": 2, **given}), "triton")


@pytest.mark.parametrize("op", OPS)
def test_many_tiles_and_splits(op: str) -> None:
    """Contexts of many tiles, the hole's and the start's edges in the middle of some."""
    more: dict[str, Any] = {}
    if op != TREE:
        more = dict(replace_at=torch.tensor([70, 200]), cache_starts=torch.tensor([0, 37]))
    length = torch.tensor([350, 301])
    args = make(
        op, 2, 3, 1, 1, dtype=FP32, K=2, page_size=32, pages=11, cache_seqlens=length, **more
    )
    verify(op, *args, "triton")
    at = torch.tensor([[150, 250, 349], [300, 220, 10]])  # windows that begin tiles apart
    args[1].update(window_size=150, positions=at[:, None] if op == BRANCH else at)
    verify(op, *args, "triton")


@pytest.mark.parametrize("N", [63, 64, 65])  # around the words of a packed mask
@pytest.mark.parametrize("D", [16, 208])  # tiles of half a word, and of a quarter
def test_packed_masks(N: int, D: int) -> None:
    trees = torch.stack([tree_mask(random_parents(N)) for _ in range(2)])
    args, kwargs = make(TREE, 2, N, 1, 1, D, 16, dtype=FP32, page_size=3, window_size=9)
    verify(TREE, args, kwargs | {"mask": pack_bits(trees)}, "triton")


@pytest.mark.parametrize("op", [TREE, BLOCK])
@pytest.mark.parametrize("kind", ["plain", "bool", "in_cache", "window"])
def test_packed_batch(op: str, kind: str) -> None:
    counts = [3, 0, 5, 1]
    args, kwargs = make(op, 4, 5, dtype=FP32, own=kind != "in_cache")
    args = [x if i in (1, 2) else packed(x, counts) for i, x in enumerate(args)]
    kwargs |= dict(cu_seqlens_q=cumulative(counts), max_seqlen_q=5)
    if kind == "bool":
        kwargs["mask"] = torch.rand(9, 5) < 0.5
    if kind == "window":
        kwargs |= dict(window_size=3, positions=torch.randint(0, 20, (9,)))
    verify(op, args, kwargs, "triton")


@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("shape", [None, (), (2,), (3, 2), "number"], ids=str)
def test_fp8(fp8: torch.dtype, shape: Any) -> None:
    scales = [0.3, 1.7] if shape == "number" else [None, None]
    if isinstance(shape, tuple):
        scales = [torch.rand(shape) + 0.5, torch.rand(shape) + 0.5]
    more = dict(k_scale=scales[0], v_scale=scales[1], own=shape != (2,))
    verify(TREE, *make(TREE, cache_dtype=fp8, dtype=FP16, **more), "triton")
