"""One step of Jacobi decoding: the public function, its checks and its binding."""

from typing import Any

import torch
from torch import Tensor

from . import binding
from .backends import choose, unavailable
from .reference import jacobi_step as reference
from .replay import replayed
from .validation import (
    INTS,
    checking,
    data_range,
    expect_dim,
    expect_dtype,
    expect_index,
    expect_tensor,
    number,
)

HAS = ("reference", "triton")


@replayed
def jacobi_step(
    draft: Tensor,
    target: Tensor,
    *,
    num_valid: int | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Accepts the fixed part of a Jacobi draft and makes the next draft out of the model's answer.

    num_accepted = the length of the run ``draft[:, i+1] == target[:, i]``, i = 0, 1, ..;
    ``next_draft[:, j] = target[:, num_accepted + j]``, the last valid target repeated in the tail;
    converged iff num_accepted == num_valid - 1. One causal forward over the draft gives target
    (Song et al., "Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving",
    ICML 2021; Santilli et al., ACL 2023, algorithm 1; Jacobi Forcing). Emit ``target[:, :
    num_accepted + 1]``: what greedy decoding would have. When target is sampled with noise that is
    frozen for each absolute position, the fixed point is an ancestral sample with that noise;
    noise drawn afresh in every iteration is biased.

    Args:
        draft: [B, n] int32/int64. draft[:, 0] is the last committed token and not counted.
        target: [B, n] int32/int64 token ids; target[:, i] follows draft[:, i].
        num_valid: int in [0, n] or [B], rows of a ragged batch, clipped to [1, n]; None: n. Later
            rows are not read.

    Returns:
        (num_accepted int32 [B], next_draft [B, n] in draft's dtype, converged bool [B]).
        next_draft[:, 0] is the last token to emit, so it can be fed to the next step as it is. With
        one valid row (or none) nothing can be accepted and the request has converged.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, by name.
        BackendUnavailable: the named backend cannot run this call.

    >>> import torch, pydecode
    >>> draft, target = torch.tensor([[7, 1, 2, 9]]), torch.tensor([[1, 2, 3, 4]])
    >>> pydecode.jacobi_step(draft, target)
    (tensor([2], dtype=torch.int32), tensor([[3, 4, 4, 4]]), tensor([False]))
    """
    draft = expect_tensor("draft", draft)
    expect_dim("draft", draft, 2, "[B, n]")
    expect_dtype("draft", draft, INTS)
    B, n = draft.shape
    target = expect_index("target", target, (B, n), "[B, n]", draft.device)
    valid: tuple[int, Tensor | None] = (n, None)
    if num_valid is not None:
        valid = number("num_valid", num_valid, B, draft.device, kind=int, minimum=0)
        if valid[1] is None and valid[0] > n:
            raise ValueError(f"num_valid: expected at most n = {n}, got {valid[0]}")
        if checking() and valid[1] is not None:
            data_range("num_valid", valid[1], 0, n + 1)
    args = (draft, target, *valid, choose("jacobi_step", backend, HAS, draft))
    return binding.call(_op, _run, *args)


def _run(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *args, backend = args  # type: ignore[assignment]
    if backend == "reference":
        return reference.jacobi_step(*args)
    if backend == "triton":
        from .triton_kernels import jacobi_step as triton

        return triton.jacobi_step(*args)
    raise unavailable("jacobi_step", backend, HAS)


def _fake(draft: Tensor, target: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    B = draft.shape[0]
    return (
        draft.new_empty(B, dtype=torch.int32),
        draft.new_empty(draft.shape),
        draft.new_empty(B, dtype=torch.bool),
    )


_op = binding.bind("jacobi_step", _run, _fake)
