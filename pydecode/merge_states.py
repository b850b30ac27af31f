"""Merging attention states: the public function, its checks and its binding."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import binding
from .attention_arguments import metadata, run_into
from .backends import choose, triton_kernels, unavailable
from .reference import merge_states as reference
from .reference.numbers import compute_dtype
from .replay import replayed
from .validation import (
    FLOATS,
    expect_device,
    expect_dtype,
    expect_last_contiguous,
    expect_shape,
    expect_tensor,
    static_number,
)

HAS = ("reference", "triton")


@replayed
def merge_states(
    outs: Tensor | Sequence[Tensor],
    lses: Tensor | Sequence[Tensor],
    *,
    temperatures: Tensor | None = None,
    scales: Tensor | None = None,
    mask: Tensor | None = None,
    log_base: float = math.e,
    out: Tensor | None = None,
    out_lse: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Merges M attention results over parts of a context into the result over all of it.

    ``l_m = scales[m] * temperatures[m] * lse_m``, ``out = sum_m softmax(l)_m out_m``,
    ``lse = logsumexp(l)``. Without temperatures and scales this is exact (FlashAttention, Dao et
    al., NeurIPS 2022, section 3.1; FlashInfer, Ye et al., MLSys 2025, section 2.2). APE (Yang et
    al., ICLR 2025) weighs parallel contexts: attend to them with the softmax scale divided by the
    temperature T, and give T and its scaling factor here.

    Args:
        outs: M parts, as attention returns them: [B, N, H, D], packed [total, H, D], or with
            branches [B, K, L, H, D]; a sequence, or one tensor with M in front. fp16 to fp64.
        lses: their [B, H, N], [H, total] or [B, K, H, L], fp32 (fp64 for fp64 outs), any strides.
        temperatures, scales: [M] floats; None: 1.
        mask: bool [B, N], packed [total], or [B, K, L]: the rows to merge; others are part 0's, bit
            for bit. None: all.
        log_base: of the log-sum-exps, given and returned; a Python number above 1, such as
            FlashInfer's 2.
        out, out_lse: the results go there, and are returned; may be one of the parts.

    Returns:
        out in the dtype and shape of a part, and lse, fp32 (fp64 for fp64 parts). A part whose lse
        is -inf contributes nothing, even if its out is NaN and whatever its weights; where all
        are -inf, out is 0 and lse -inf.

    Raises:
        ValueError, TypeError: no parts, or a shape, dtype or device that does not fit, by name.
        BackendUnavailable: the named backend cannot run this call.

    >>> import torch, pydecode
    >>> outs, lses = torch.randn(2, 1, 3, 4, 16), torch.randn(2, 1, 4, 3)
    >>> out, lse = pydecode.merge_states(outs, lses)
    >>> torch.allclose(lse, lses.logsumexp(0))
    True
    """
    parts, logs = _parts("outs", outs), _parts("lses", lses)
    met = metadata(len(parts), *parts, *logs, temperatures, scales, mask)
    if met is None or met not in _fit:
        _expect_parts(parts, logs, temperatures, scales, mask)
        if met is not None:
            if len(_fit) >= 4096:
                _fit.clear()
            _fit.add(met)
    first = parts[0]
    log_base = static_number("log_base", log_base)
    if log_base <= 1:
        raise ValueError(f"log_base: expected a number above 1, got {log_base}")
    chosen = choose("merge_states", backend, HAS, first)
    args = (parts, logs, temperatures, scales, mask, log_base, chosen)
    if out is None and out_lse is None:
        return binding.call(_op, _run, *args)
    given = []
    for name, x, like in (("out", out, first), ("out_lse", out_lse, logs[0])):
        if x is None:
            x = like.new_empty(like.shape)
        else:
            x = expect_tensor(name, x)
            expect_shape(name, x, like.shape, "a part's")
            expect_dtype(name, x, (like.dtype,))
            expect_device(name, x, like.device)
        given.append(x)
    expect_last_contiguous("out", given[0])
    binding.call(_op_out, run_into(_run), *args, out_out=given[0], out_lse=given[1])
    return given[0], given[1]


_fit: set[tuple[Any, ...]] = set()  # what _expect_parts has found in order


def _expect_parts(
    parts: list[Tensor], logs: list[Tensor], temperatures: Any, scales: Any, mask: Any
) -> None:
    if len(parts) == 0:
        raise ValueError("outs: expected at least one part, got none")
    if len(logs) != len(parts):
        raise ValueError(f"lses: expected {len(parts)} parts as outs, got {len(logs)}")
    first = parts[0]
    if first.dim() not in (3, 4, 5):
        raise ValueError(
            f"outs: expected parts [B, N, H, D], [total, H, D] or [B, K, L, H, D], "
            f"got shape {list(first.shape)}"
        )
    lse_shape = (*first.shape[:-3], first.shape[-2], first.shape[-3])
    expect_dtype("outs", first, FLOATS)
    for m, (part, log) in enumerate(zip(parts, logs)):
        expect_shape(f"outs[{m}]", part, first.shape, "outs[0]'s")
        expect_dtype(f"outs[{m}]", part, (first.dtype,))
        expect_device(f"outs[{m}]", part, first.device)
        expect_last_contiguous(f"outs[{m}]", part)
        expect_shape(f"lses[{m}]", log, lse_shape, "[..., H, N]")
        expect_dtype(f"lses[{m}]", log, (compute_dtype(first.dtype),))
        expect_device(f"lses[{m}]", log, first.device)
    for name, weight in (("temperatures", temperatures), ("scales", scales)):
        if weight is not None:
            weight = expect_tensor(name, weight)
            expect_shape(name, weight, (len(parts),), "[M]")
            expect_dtype(name, weight, FLOATS)
            expect_device(name, weight, first.device)
    if mask is not None:
        mask = expect_tensor("mask", mask)
        expect_dtype("mask", mask, (torch.bool,))
        expect_shape("mask", mask, first.shape[:-2], "[..., N]")
        expect_device("mask", mask, first.device)


def _parts(name: str, parts: Any) -> list[Tensor]:
    if isinstance(parts, Tensor):
        if parts.dim() == 0:
            raise ValueError(f"{name}: expected M parts in the first dimension, got a 0-d tensor")
        return list(expect_tensor(name, parts).unbind(0))
    if not isinstance(parts, Sequence):
        raise TypeError(f"{name}: expected a tensor or tensors, got {type(parts).__name__}")
    return [expect_tensor(f"{name}[{m}]", part) for m, part in enumerate(parts)]


def _run(*args: Any) -> tuple[Tensor, Tensor]:
    *args, backend = args  # type: ignore[assignment]
    if backend == "reference":
        return reference.merge_states(*args)
    if backend == "triton":
        return triton_kernels("merge_states").merge_states(*args)
    raise unavailable("merge_states", backend, HAS)


def _fake(outs: list[Tensor], lses: list[Tensor], *args: Any) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(outs[0].dtype)
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape, dtype=dtype)


_op = binding.bind("merge_states", _run, _fake)
_op_out = binding.bind_out("merge_states", run_into(_run))
