"""Credit for the tokens that rows keep preferring: the public function, its checks, its binding."""

from typing import Any

import torch
from torch import Tensor

from . import binding
from . import sampling_arguments as arguments
from .backends import choose, unavailable
from .reference import earn_credit as reference
from .validation import (
    INTS,
    checking,
    data_range,
    expect_device,
    expect_dim,
    expect_dtype,
    expect_index,
    expect_shape,
    expect_tensor,
    static_number,
)
from .write_kv import expect_writable

HAS = ("reference",)


def earn_credit(
    credit_ids: Tensor,
    credit: Tensor,
    tokens: Tensor,
    confidence: Tensor,
    *,
    alive: Tensor | None = None,
    gamma: float = 0.2,
    decay: float = 0.8,
    alpha: float = 0.7,
    backend: str | None = None,
) -> Tensor:
    """Credits the token that each row prefers in this step, in place; returns the logits' bias.

    A token that stays a masked row's favourite from step to step becomes likelier (dInfer's
    ``CreditThresholdParallelDecoder``, inclusionAI/dInfer, parallel_strategy.py at fce4e32): all
    credit of a row decays, ``credit *= decay``, its token earns ``credit[token] += p ** gamma``,
    and ``logits[id] += alpha * log(1 + credit[id])``. Theirs is dense, [B, L, V]; here a row holds
    S ids. A token that has none of them takes the slot of least credit, the lowest of equal ones:
    with no more favourites than slots a row has the dense state's credit, beyond that the smallest
    is forgotten. No number changes from step to step, so a graph captures a step as it is.

    Args:
        credit_ids: [B, L, S] int32/int64, **mutated**: the ids that have credit, -1 where none; at
            first all -1. The ids of a row that are not -1 differ.
        credit: [B, L, S] fp32 or fp64, **mutated**: what each has, at first 0. Negative or NaN
            counts as 0.
        tokens: [B, L] int32/int64, what each row prefers; a negative one earns nothing.
        confidence: [B, L] floats, p. Rows where it is not positive (NaN, -inf where ``unmask`` read
            no row) earn nothing, and only decay. ``unmask(..., k=0, min_commit=0,
            return_proposals=True)`` has both.
        alive: 0-d, [B] or [B, n] bool. A request with no True loses the credit of earlier steps
            before this one is counted, and so has this step's alone. With ``alive = x == mask_id``
            of the step before, credit lives as long as its request has masks.
        gamma, decay: at least 0, and alpha: all three static.

    Returns:
        bias [B, L, S] of credit's dtype, fresh: with credit_ids the ``bias_ids`` and ``bias`` of
        ``unmask`` and ``sample_and_score``.

    Raises:
        ValueError, TypeError: a shape, dtype, device or stride that does not fit, by name.
        BackendUnavailable: the named backend cannot run this call.

    >>> import torch, pydecode
    >>> ids, credit = torch.full((1, 1, 2), -1), torch.zeros(1, 1, 2)
    >>> for token in (7, 7, 4):
    ...     bias = pydecode.earn_credit(
    ...         ids, credit, torch.tensor([[token]]), torch.ones(1, 1), decay=0.5)
    >>> ids.tolist(), credit.tolist()
    ([[[7, 4]]], [[[0.75, 1.0]]])
    """
    credit_ids, credit = expect_tensor("credit_ids", credit_ids), expect_tensor("credit", credit)
    expect_dtype("credit_ids", credit_ids, INTS)
    expect_dim("credit_ids", credit_ids, 3, "[B, L, S]")
    expect_dtype("credit", credit, (torch.float32, torch.float64))
    expect_shape("credit", credit, credit_ids.shape, "[B, L, S]")
    expect_writable("credit_ids", credit_ids)
    expect_writable("credit", credit)
    device = credit_ids.device
    expect_device("credit", credit, device)
    tokens = expect_index("tokens", tokens, credit_ids.shape[:2], "[B, L]", device)
    confidence = arguments.expect_scores("confidence", confidence, tokens)
    if checking():
        limit = torch.iinfo(credit_ids.dtype).max
        data_range("credit_ids", credit_ids, -1, limit)
        data_range("tokens", tokens, torch.iinfo(tokens.dtype).min, limit)
    result: Tensor = binding.call(
        _op,
        _run,
        *(credit_ids, credit, tokens, confidence, _alive(alive, tokens)),
        static_number("gamma", gamma, minimum=0),
        static_number("decay", decay, minimum=0),
        static_number("alpha", alpha),
        choose("earn_credit", backend, HAS),
    )
    return result


def _alive(alive: Any, tokens: Tensor) -> Tensor | None:
    if alive is None:
        return None
    alive = expect_tensor("alive", alive)
    expect_dtype("alive", alive, (torch.bool,))
    expect_device("alive", alive, tokens.device)
    B = tokens.shape[0]
    if alive.dim() > 2 or (alive.dim() and alive.shape[0] != B):
        raise ValueError(
            f"alive: expected 0-d, [B] or [B, n] with B = {B}, got shape {list(alive.shape)}"
        )
    return alive


def _run(*args: Any) -> Tensor:
    *args, backend = args  # type: ignore[assignment]
    if backend == "reference":
        return reference.earn_credit(*args)
    raise unavailable("earn_credit", backend, HAS)


def _fake(credit_ids: Tensor, credit: Tensor, *args: Any) -> Tensor:
    return credit.new_empty(credit.shape)


_op = binding.bind("earn_credit", _run, _fake)
