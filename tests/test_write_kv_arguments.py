"""write_kv's errors, which name the argument, and its synchronising checks."""

import pytest
import torch

import pydecode

B, N, H, D = 3, 4, 2, 8

BAD_ARGUMENTS = {
    "k": (dict(k=torch.zeros(B, N, H)), ValueError, "k: expected 4 dimensions"),
    "k ints": (dict(k=torch.zeros(B, N, H, D, dtype=torch.int32)), TypeError, "k: expected dtype"),
    "v": (dict(v=torch.zeros(B, N + 1, H, D)), ValueError, "v: expected shape"),
    "v dtype": (dict(v=torch.zeros(B, N, H, D).half()), TypeError, "v: expected dtype float32"),
    "heads": (dict(k=torch.zeros(B, N, 4, D), v=torch.zeros(B, N, 4, D)), ValueError, "Hkv = 4"),
    "k_cache": (dict(k_cache=torch.zeros(B, 5, H, D + 1)), ValueError, "k_cache: expected shape"),
    "v_cache": (dict(v_cache=torch.zeros(B, 5, H, D + 1)), ValueError, "v_cache: expected head"),
    "dtype": (dict(k_cache=torch.zeros(B, 5, H, D).half()), TypeError, "k_cache: expected dtype"),
    "stride 0": (
        dict(k_cache=torch.zeros(B, 1, H, D).expand(B, 5, H, D)),
        *(ValueError, "k_cache: expected a cache without stride 0"),
    ),
    "last": (
        dict(k_cache=torch.zeros(B, 5, D, H).transpose(2, 3)),
        *(ValueError, "k_cache: expected the last dimension contiguous"),
    ),
    "positions": (
        dict(positions=torch.zeros(B, 1).long()),
        ValueError,
        "positions: expected shape",
    ),
    "positions dtype": (dict(positions=torch.zeros(B, N)), TypeError, "positions: expected dtype"),
    "table": (dict(block_table=torch.zeros(B).long()), ValueError, "block_table: expected 2"),
    "cos alone": (dict(cos=torch.zeros(B, N, 2)), ValueError, "cos, sin: expected both"),
    "cos": (
        dict(cos=torch.zeros(B, N, 5), sin=torch.zeros(B, N, 5)),
        *(ValueError, "cos: expected R <= D = 8, got R = 10"),
    ),
    "sin": (
        dict(cos=torch.zeros(B, N, 2), sin=torch.zeros(B, N, 3)),
        *(ValueError, "sin: expected shape"),
    ),
    "q": (dict(q=torch.zeros(B, N, H, D + 1)), ValueError, "q: expected shape"),
    "k_scale": (dict(k_scale=torch.ones(5)), ValueError, "k_scale: expected a number, 0-d"),
    "v_scale": (dict(v_scale="big"), TypeError, "v_scale: expected a number"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_errors_name_the_argument(case: str) -> None:
    change, error, message = BAD_ARGUMENTS[case]
    good = dict(
        **dict(k=torch.zeros(B, N, H, D), v=torch.zeros(B, N, H, D)),
        **dict(k_cache=torch.zeros(B, 5, H, D), v_cache=torch.zeros(B, 5, H, D)),
        positions=torch.zeros(B, N, dtype=torch.int64),
    )
    with pytest.raises(error, match=message):
        pydecode.write_kv(**{**good, **change})


def test_checks_raise_with_the_offending_index() -> None:
    kv, cache = torch.zeros(1, 2, H, D), torch.zeros(2, 3, 4, H, D)
    table = torch.tensor([[1, 3]])
    with pydecode.checks(True):
        pydecode.write_kv(kv, kv, *cache, positions=torch.tensor([[0, -1]]), block_table=table)
        with pytest.raises(
            ValueError, match=r"positions: expected below 8, got 8 at index \[0, 1\]"
        ):
            pydecode.write_kv(kv, kv, *cache, positions=torch.tensor([[0, 8]]), block_table=table)
        with pytest.raises(ValueError, match=r"block_table.*got 3 at index \[0, 1\]"):
            pydecode.write_kv(kv, kv, *cache, positions=torch.tensor([[3, 4]]), block_table=table)
