"""Masking the least sure tokens again: the public function, its checks and its binding."""

from typing import Any

import torch
from torch import Tensor

from . import binding
from . import sampling_arguments as arguments
from .backends import choose, unavailable
from .reference import remask as reference
from .replay import replayed
from .validation import checking, data_range, number

HAS = ("reference", "triton")


@replayed
def remask(
    tokens: Tensor,
    scores: Tensor,
    *,
    r: int | Tensor,
    mask_id: int,
    backend: str | None = None,
) -> Tensor:
    """Masks the r least sure committed tokens of every request again.

    Of the positions with tokens != mask_id the r of lowest score (ReMDM, Wang et al., 2025, section
    4; RCR in ParallelBench). Ties go to the lowest position; a NaN is less sure than any number.

    Args:
        tokens: [B, L] int64. Whatever may never be masked again (a prompt) is best sliced off.
        scores: [B, L] floats, larger is surer.
        r: number, 0-d or [B]; more than are committed masks all of them, 0 or less none.
        mask_id: the mask's token id.

    Returns:
        The new tokens [B, L]; ``tokens`` is left as it was.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, by name.
        BackendUnavailable: the named backend cannot run this call.

    >>> import torch, pydecode
    >>> tokens, scores = torch.tensor([[5, 9, 7, 8]]), torch.tensor([[0.9, 0.0, 0.2, 0.2]])
    >>> pydecode.remask(tokens, scores, r=1, mask_id=9).tolist()
    [[5, 9, 9, 8]]
    """
    tokens = arguments.expect_tokens("tokens", tokens)
    scores = arguments.expect_scores("scores", scores, tokens)
    count = number("r", r, tokens.shape[0], tokens.device, kind=int, minimum=0)
    if checking() and count[1] is not None:
        data_range("r", count[1], 0, torch.iinfo(torch.int64).max)
    args = (tokens, scores, *count, arguments.token_id("mask_id", mask_id))
    result: Tensor = binding.call(_op, _run, *args, choose("remask", backend, HAS, scores))
    return result


def _run(*args: Any) -> Tensor:
    *args, backend = args  # type: ignore[assignment]
    if backend == "reference":
        return reference.remask(*args)
    if backend == "triton":
        from .triton_kernels import remask as triton

        return triton.remask(*args)
    raise unavailable("remask", backend, HAS)


def _fake(tokens: Tensor, *args: Any) -> Tensor:
    return tokens.new_empty(tokens.shape)


_op = binding.bind("remask", _run, _fake)
