"""Bad metadata in the attention ops: an error before any launch that names the argument."""

from typing import Any

import pytest
import torch
from attention_calls import OPS, make

import pydecode

COMMON: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(softcap=-1.0), ValueError, "softcap: expected a number >= 0"),
    (dict(softmax_scale=float("nan")), ValueError, "softmax_scale: expected a number, got nan"),
    (dict(softmax_scale=torch.tensor(1.0)), TypeError, "softmax_scale: expected a number, got a t"),
    (dict(window_size=0), ValueError, "window_size: expected an int >= 1"),
    (dict(sinks=torch.zeros(3)), ValueError, r"sinks: expected shape \[Hq\] = \[4\], got \[3\]"),
    (dict(k_scale=torch.ones(3)), ValueError, "k_scale: expected a number, 0-d"),
    (dict(v_scale=torch.ones(2).half()), TypeError, "v_scale: expected dtype float32"),
    (
        dict(cache_seqlens=torch.zeros(2).long()),
        ValueError,
        r"cache_seqlens: expected 0-d or \[B\]",
    ),
    (dict(cache_seqlens=torch.zeros(3)), TypeError, "cache_seqlens: expected dtype int32, int64"),
    (dict(cache_seqlens=2.5), TypeError, "cache_seqlens: expected an integer"),
    (dict(num_tokens=9), ValueError, r"num_tokens: expected an integer in \[0, 5\], got 9"),
    (dict(block_table=torch.zeros(2, 4).long()), ValueError, "block_table: expected shape"),
    (dict(block_table=torch.zeros(3, 4)), TypeError, "block_table: expected dtype int32, int64"),
    (dict(block_table=[[0]]), TypeError, "block_table: expected a tensor, got list"),
    (
        dict(block_table=torch.zeros(3, 4, device="meta").long()),
        ValueError,
        "block_table: expected a",
    ),
    (dict(out=torch.zeros(1)), ValueError, "out: expected shape q's shape with Dv"),
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("change", "error", "message"), COMMON, ids=[next(iter(c[0])) for c in COMMON]
)
def test_bad_arguments(
    op: str, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    args, kwargs = make(op)
    with pytest.raises(error, match=message):
        getattr(pydecode, op)(*args, **kwargs | change)


def edited(args: list[Any], i: int, edit: Any) -> list[Any]:
    return [edit(x) if j == i else x for j, x in enumerate(args)]


@pytest.mark.parametrize("op", OPS)
def test_bad_tensors(op: str) -> None:
    args, kwargs = make(op)
    run = getattr(pydecode, op)
    k = "k" if op == "ranked_attention" else "k_cache"
    bad: list[tuple[int, Any, type[Exception], str]] = [
        (0, lambda x: None, TypeError, "q: expected a tensor, got NoneType"),
        (0, lambda x: x.long(), TypeError, "q: expected dtype float16"),
        (0, lambda x: x[..., ::2], ValueError, "q: expected the last dimension contiguous"),
        (0, lambda x: x[0], ValueError, "q: expected . dimensions"),
        (
            0,
            lambda x: x[..., :3, :],
            ValueError,
            "q: expected Hq a multiple of Hkv = 2, got Hq = 3",
        ),
        (1, lambda x: x.half(), TypeError, f"{k}: expected dtype float64 .as q has., float8"),
        (
            1,
            lambda x: x[0],
            ValueError,
            f"{k}: expected 4 dimensions .num_pages, page_size, Hkv, D",
        ),
        (1, lambda x: x[..., :8], ValueError, f"{k}: expected shape"),
        (2, lambda x: x[:3], ValueError, f"v{k[1:]}: expected shape"),
        (2, lambda x: x.mT, ValueError, f"v{k[1:]}: expected shape"),
    ]
    if op != "ranked_attention":
        bad += [
            (3, lambda x: x[..., :1, :], ValueError, "k: expected shape"),
            (4, lambda x: x.float(), TypeError, "v: expected dtype float64, got float32"),
        ]
    for i, edit, error, message in bad:
        with pytest.raises(error, match=message):
            run(*edited(args, i, edit), **kwargs)
