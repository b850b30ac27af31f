"""Host-side validation: every error names the argument, what was expected and what came.

These checks read shapes, dtypes, devices and strides only, never device data, so they cost no
synchronisation. What only the device knows is checked by ``data_*`` when ``pydecode.checks(True)``
(or PYDECODE_CHECK=1) asks for it; those synchronise, and raise with the offending index.
"""

import numbers
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
INTS = (torch.int32, torch.int64)

_data_checks = os.environ.get("PYDECODE_CHECK", "") not in ("", "0")


class checks:
    """Turns the synchronising validation of device data on or off, for all calls that follow.

    Off by default (PYDECODE_CHECK=1 turns it on at import). Bad device data (page ids, lengths,
    token ids) is always harmless; with checks on it raises ``ValueError`` with the offending index.
    As a context manager it restores the previous state. Skipped under ``torch.compile``.

    >>> import pydecode
    >>> with pydecode.checks(True):
    ...     pass
    """

    def __init__(self, enabled: bool = True) -> None:
        global _data_checks
        self.previous = _data_checks
        _data_checks = bool(enabled)

    def __enter__(self) -> "checks":
        return self

    def __exit__(self, *exc: object) -> None:
        global _data_checks
        _data_checks = self.previous


def checking() -> bool:
    """Whether device data is to be validated in this call."""
    return _data_checks and not torch.compiler.is_compiling()


# ---- tensors ------------------------------------------------------------------------------------


def expect_tensor(name: str, x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    return x.detach() if x.requires_grad else x


def expect_shape(name: str, x: Tensor, shape: Sequence[int], symbols: str) -> None:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {symbols} = {list(shape)}, got {list(x.shape)}")


def expect_dim(name: str, x: Tensor, dim: int, symbols: str) -> None:
    if x.dim() != dim:
        raise ValueError(f"{name}: expected {dim} dimensions {symbols}, got shape {list(x.shape)}")


def expect_dtype(name: str, x: Tensor, dtypes: Sequence[torch.dtype], why: str = "") -> None:
    """``why`` says where the first of the dtypes comes from."""
    if x.dtype not in dtypes:
        names = [str(d).removeprefix("torch.") for d in dtypes]
        names[0] += f" ({why})" if why else ""
        got = str(x.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected dtype {', '.join(names)}, got {got}")


def expect_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {x.device}")


def expect_last_contiguous(name: str, x: Tensor) -> None:
    if x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{name}: expected the last dimension contiguous, got stride {x.stride(-1)}; "
            f"call .contiguous()"
        )


def expect_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def expect_index(
    name: str, x: Any, shape: Sequence[int], symbols: str, device: torch.device
) -> Tensor:
    """An int32 or int64 tensor of the given shape."""
    x = expect_tensor(name, x)
    expect_dtype(name, x, INTS)
    expect_shape(name, x, shape, symbols)
    expect_device(name, x, device)
    return x


# ---- numbers ------------------------------------------------------------------------------------


def number(
    name: str,
    value: Any,
    batch: int | None,
    device: torch.device,
    *,
    kind: type = float,
    minimum: float | None = None,
) -> tuple[Any, Tensor | None]:
    """Splits a server-changed number into the schema's pair (Python number, tensor or None).

    A tensor is 0-d or [batch] (``batch=None``: 0-d only), on ``device``; ints for ``kind=int``.
    Under ``torch.compile`` a float becomes a 0-d tensor, for Dynamo would compile anew for each
    new value of a float argument, and give up after eight.
    """
    if isinstance(value, Tensor):
        if value.dim() != 0 and (batch is None or tuple(value.shape) != (batch,)):
            want = "a number or a 0-d tensor" if batch is None else f"0-d or [B] = [{batch}]"
            raise ValueError(f"{name}: expected {want}, got shape {list(value.shape)}")
        expect_dtype(name, value, INTS if kind is int else (*FLOATS, *INTS))
        expect_device(name, value, device)
        return kind(0), value.detach() if value.requires_grad else value
    value = static_number(name, value, kind=kind, minimum=minimum)
    if kind is float and torch.compiler.is_compiling():
        # zeros + value stays one graph for all values; torch.full and torch.tensor do not
        return 0.0, torch.zeros((), dtype=torch.float64, device=device) + value
    return value, None


def static_number(
    name: str, value: Any, *, kind: type = float, minimum: float | None = None
) -> Any:
    """A number that does not change between steps: no tensor."""
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        what = "an integer" if kind is int else "a number"
        raise TypeError(f"{name}: expected {what}, got {type(value).__name__}")
    if kind is int and not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value != value:  # not math.isnan, which torch.compile cannot trace on a changing float
        raise ValueError(f"{name}: expected a number, got nan")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")
    return kind(value)


def signed64(value: int) -> int:
    """A 64-bit seed or offset as the schema's signed int: 2**64 - 1 becomes -1."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


# ---- device data (synchronising, only when checking()) -------------------------------------------


def data_range(name: str, x: Tensor, low: int, high: int, where: Tensor | None = None) -> None:
    """Every entry of x (where ``where`` holds) lies in [low, high)."""
    bad = (x < low) | (x >= high)
    if where is not None:
        bad = bad & where
    index = bad.nonzero()
    if index.numel():
        first = index[0].tolist()
        raise ValueError(
            f"{name}: expected entries in [{low}, {high}), got {x[tuple(first)].item()} "
            f"at index {first}"
        )


def data_at_most(name: str, x: Tensor, limit: Tensor | int, what: str) -> None:
    """Every entry of x is at most ``limit``."""
    index = (x > limit).nonzero()
    if index.numel():
        first = index[0].tolist()
        raise ValueError(f"{name}: {what}, got {x[tuple(first)].item()} at index {first}")
