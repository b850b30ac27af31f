"""The coins of a verification: a caller's uniforms, or Philox draws of a request."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .law_arguments import pair
from .philox import key_of, uniform
from .vocabulary import as_scalar, number


class Draws(NamedTuple):
    """Where the coins come from; numbers that change between steps are the kernels' arguments."""

    uniforms: Any  # [B, ..], or None
    stride_uniforms_b: Any
    stride_uniforms_i: Any
    seed_of: Any
    stride_seed: Any
    offset_of: Any
    stride_offset: Any
    positions_of: Any
    stride_positions: Any
    PER_REQUEST: Any  # a seed a request


def draws_of(
    seed_of: Tensor | None,
    offset_of: Tensor | None,
    positions_of: Tensor | None,
    uniforms: Tensor | None,
) -> Draws:
    return Draws(
        uniforms,
        *((0, 0) if uniforms is None else uniforms.stride()),
        *pair(0, seed_of)[1:],
        *pair(0, offset_of)[1:],
        *pair(0, positions_of)[1:],
        tl.constexpr(seed_of is not None and seed_of.dim() == 1),
    )


@triton.jit
def coin(STREAM: tl.constexpr, draws, seed, offset, position, b, column, index, mask):
    """The uniforms of drafts ``index`` (int64), which a caller's tensor has in ``column``.

    A caller's NaN or negative number counts as 1: it accepts nothing that p does not cover.
    """
    if draws.uniforms is not None:
        at = draws.uniforms + b.to(tl.int64) * draws.stride_uniforms_b
        given = tl.load(at + column * draws.stride_uniforms_i, mask=mask, other=0.0)
        u = given.to(tl.float32)
        u = tl.where(given < 1, tl.minimum(u, 0.999999940395355225), u)  # fp64 may round up to 1
        u = tl.where(u >= 0, u, 1.0)
    else:
        key = as_scalar(number(seed, draws.seed_of, draws.stride_seed, b), tl.int64)
        key = key_of(key, b, draws.PER_REQUEST)
        offset_b = as_scalar(number(offset, draws.offset_of, draws.stride_offset, b), tl.int64)
        at_b = number(position, draws.positions_of, draws.stride_positions, b)
        u = uniform(STREAM, key, offset_b, as_scalar(at_b, tl.int64), index)
    return u
