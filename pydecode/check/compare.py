"""How far a result may lie from the fp64 reference: the tolerance rule of DESIGN section 3.

Floats: the largest error is at most twice that of the same formula in PyTorch at the input's dtype,
plus the rounding of the output, and the same holds for the root of the mean square. Integers are
exact, but for decisions that the reference itself would change under a rounding error.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Bound(NamedTuple):
    """Errors as shares of what is allowed; above 1 is a failure."""

    largest: float
    rms: float

    @property
    def worst(self) -> float:
        return max(self.largest, self.rms)


def share_of_bound(got: Tensor, want: Tensor, plain: Tensor, rounding: torch.dtype) -> Bound:
    """got against fp64 ``want``; ``plain`` is the same formula without our wider accumulation.

    NaN and infinities must agree. ``rounding`` is the dtype that the result was rounded to.
    """
    if got.numel() == 0:
        return Bound(0.0, 0.0)
    got, want, plain = got.double(), want.double(), plain.double()
    same = (got == want) | (got.isnan() & want.isnan())
    finite = got.isfinite() & want.isfinite()
    if not bool((same | finite).all()):
        return Bound(torch.inf, torch.inf)
    zero = got.new_zeros(())
    error = torch.where(same, zero, (got - want).abs())
    usual = torch.where(plain.isfinite() & want.isfinite(), (plain - want).abs(), zero)
    size = torch.where(want.isfinite(), want.abs(), zero)
    # one rounding to the result's dtype, and the accumulation's own noise, where a tiny case may
    # have had luck with the plain formula
    eps = torch.finfo(rounding).eps
    noise = 4 * max(torch.finfo(torch.float32).eps, eps if eps < 1e-10 else 0.0)
    allowed = 2 * usual.amax() + eps * size + noise * size.amax()
    rms = (2 * _rms(usual) + eps * _rms(size) + noise * float(size.amax())) or 1.0
    ratio = torch.where(error > 0, error / allowed, zero)
    return Bound(float(ratio.amax()), _rms(error) / rms)


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits, NaN included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype.is_floating_point:
        ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        a, b = a.contiguous().view(ints), b.contiguous().view(ints)
    return torch.equal(a, b)
