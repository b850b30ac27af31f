"""Launches that the static report must refuse, each for one reason: the controls of its tests."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
from pydecode.triton_kernels.static_call import StaticCall
from static_kernels import CONFIGURATIONS as GOOD
from static_kernels import example_scores, example_total, scores, total

_TILE = GOOD["bfloat16", 16]

CONFIGURATIONS: dict[Any, dict[str, Any]] = {
    "spills": dict(_TILE, BM=64, maxnreg=32),
    "odd": _TILE,
    "odd row": GOOD["row"],
    "masked row": dict(GOOD["row"], MASKED=True),
    "even": _TILE,
    "small": _TILE,
    "large": GOOD["bfloat16", 64],
    "one stage": dict(_TILE, num_stages=1),
    "shared": dict(_TILE, BN=128, D=128, num_stages=5),
    "typed again": _TILE,
    "unknown": dict(_TILE, num_stagess=3),
    "never compiled": _TILE,
    "dtype": _TILE,
}


@triton.jit
def forgotten(x):
    pass


def static_calls(arch: str) -> Iterator[StaticCall]:
    bf16 = torch.bfloat16
    plain = example_scores(bf16, 16)

    def call(key: str, arguments: dict[str, Any] = plain, m: int = 16, **more: Any) -> StaticCall:
        return StaticCall(scores, key, arguments, bf16, m, **more)

    odd = example_scores(bf16, 16, width=65)
    wide = dict(plain, stride_q=128, stride_k=1024, stride_out=128)
    if arch == "sm_86":
        yield call("spills", example_scores(bf16, 64), 64)
        yield call("shared", wide)
        return
    yield call("odd", odd)  # as if 16 bytes could be read
    yield StaticCall(total, "odd row", example_total(8193), bf16, streamed=8192)
    yield StaticCall(total, "masked row", example_total(8192), bf16, streamed=8192)
    yield call("even", aligned=False)  # an excuse that is not there
    yield call("small", m=64)  # promises HGMMA on sm_90, has a tile of 16 rows
    yield call("large", example_scores(bf16, 64), m=16)  # promises HMMA, has 64 rows
    yield call("one stage", stages=3)
    yield call("typed again", dict(plain, BM=16))
    yield call("unknown")
    yield StaticCall(scores, "dtype", plain, torch.float8_e5m2, 16)
    yield StaticCall(scores, "no such entry", plain, bf16, 16)
