"""Verification of drafted block states: the public function, its checks and its binding."""

from typing import Any

import torch
from torch import Tensor

from . import binding
from .backends import choose, unavailable
from .reference import verify_states as reference
from .replay import replayed
from .validation import (
    INTS,
    expect_choice,
    expect_device,
    expect_dim,
    expect_dtype,
    expect_index,
    expect_tensor,
)

RULES = ("exact", "subset")
HAS = ("reference", "triton")


@replayed
def verify_states(
    states: Tensor,
    targets: Tensor,
    *,
    mask_id: int,
    rule: str = "exact",
    graph: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Finds the furthest drafted state of a diffusion block that stepwise decoding would reach.

    One forward over K states gives each one's stepwise successor, ``targets[k] = F(states[k])``.
    The walk starts at state 0, which is certain, and moves along allowed edges ``best -> j`` while

    - ``exact``: states[j] == targets[best] everywhere (SSD, Self Speculative Decoding for diffusion
      LLMs; Spiffy); of equal states it moves to the lowest j;
    - ``subset``: states[j] == targets[best] wherever states[j] is not ``mask_id``, to the largest
      such j, so that steps of several tokens count (FreeDave, section 3: D_j within F(D_best)).

    Lossless with respect to the stepwise decoder that uses the same cache, tie break and block
    boundaries; targets[best] is then the next certain state, at no extra forward.

    Args:
        states: [B, K, L] int32/int64, K >= 1; for ``subset`` along a chain, ordered by how much is
            filled in.
        targets: [B, K, L] int32/int64.
        mask_id: the mask token's id (only ``subset`` reads it).
        graph: bool [B|1, K, K], allowed edges i -> j; None: j > i. No state is visited twice, so a
            cycle ends the walk.

    Returns:
        best: [B] int64 (it can index), the accepted state's number.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, K = 0, an unknown rule.
        BackendUnavailable: the named backend cannot run this call.

    >>> import torch, pydecode
    >>> states = torch.tensor([[[5, 0, 0], [5, 6, 0], [5, 6, 7]]])  # mask_id = 0
    >>> targets = torch.tensor([[[5, 6, 0], [5, 6, 8], [5, 6, 7]]])
    >>> pydecode.verify_states(states, targets, mask_id=0)
    tensor([1])
    """
    states = expect_tensor("states", states)
    expect_dim("states", states, 3, "[B, K, L]")
    expect_dtype("states", states, INTS)
    B, K, _ = states.shape
    if K == 0:
        raise ValueError("states: expected K >= 1 (state 0 is the certain one), got K = 0")
    targets = expect_index("targets", targets, states.shape, "[B, K, L]", states.device)
    if isinstance(mask_id, bool) or not isinstance(mask_id, int):
        raise TypeError(f"mask_id: expected an int, got {type(mask_id).__name__}")
    expect_choice("rule", rule, RULES)
    if graph is not None:
        graph = expect_tensor("graph", graph)
        expect_dtype("graph", graph, (torch.bool,))
        expect_device("graph", graph, states.device)
        if tuple(graph.shape) not in ((B, K, K), (1, K, K)):
            raise ValueError(
                f"graph: expected shape [B|1, K, K] = [{B}|1, {K}, {K}], got {list(graph.shape)}"
            )
    args = (states, targets, mask_id, rule, graph, choose("verify_states", backend, HAS, states))
    return binding.call(_op, _run, *args)


def _run(*args: Any) -> Tensor:
    *args, backend = args  # type: ignore[assignment]
    if backend == "reference":
        return reference.verify_states(*args)
    if backend == "triton":
        from .triton_kernels import verify_states as triton

        return triton.verify_states(*args)
    raise unavailable("verify_states", backend, HAS)


def _fake(states: Tensor, *args: Any) -> Tensor:
    return states.new_empty(states.shape[0], dtype=torch.int64)


_op = binding.bind("verify_states", _run, _fake)
