"""Acceptance by universal coupling: the public function, its checks and its binding."""

from typing import Any

import torch
from torch import Tensor

from . import binding
from . import sampling_arguments as arguments
from .backends import choose, triton_kernels, unavailable
from .reference import coupled_accept as reference
from .replay import replayed
from .validation import (
    checking,
    data_range,
    expect_device,
    expect_dim,
    expect_index,
    expect_shape,
    number,
)

HAS = ("reference", "triton")


@replayed
def coupled_accept(
    draft_logits: Tensor,
    verifier_logits: Tensor,
    tokens: Tensor,
    *,
    ratio: float | Tensor | None = None,
    temperature: float | Tensor | None = None,
    seed: int | Tensor = 0,
    offset: int | Tensor = 0,
    positions: Tensor | None = None,
    force_first: bool = True,
    backend: str | None = None,
) -> Tensor:
    """How many drafted tokens the coupled sample of a mixture of two models repeats.

    ``y_i = argmax((R l_D + (1-R) l_A) / T + g_i)`` with the very noise g that drafted
    ``x_i = argmax(l_D / T + g_i)``; the longest prefix with y_i = x_i is accepted (APD, Israel et
    al., 2025, section 3; coupling without communication, Daliri et al., 2024). y_i follows
    p_D^R p_A^(1-R), normalised; x and y agree at a position with probability
    sum_x 1 / sum_y max(p_y/p_x, q_y/q_x). Emitting x while they agree, as APD does, samples that
    mixture only approximately.

    The drafts must come from ``sample_and_score(draft_logits, sampler="gumbel", ...)`` with the
    same temperature (whose default there is 0), seed, offset and positions, no filters, and
    excluded ids at -inf in ``draft_logits``: the noise is regenerated bit for bit.

    Args:
        draft_logits, verifier_logits: [B, M, V], logits or log probabilities (equal up to a
            constant), fp16, bf16, fp32 or fp64. A -inf rules a token out, unless its weight (R or
            1-R) is 0.
        tokens: [B, M] int32 or int64, x. One outside [0, V) ends its request's prefix.
        ratio: R, number in [0, 1], 0-d or [B]: 1 is the draft model alone, 0 the verifier alone;
            None: 0.5.
        temperature: number, 0-d or [B], None: 1; 0 draws no noise (the argmax of the mixture).
        seed, offset: int, 0-d or [B]; a scalar seed is mixed with the request's index in the batch.
        positions: [B, M] int32 or int64, as at the draft's sampling; None: the index in M, which
            does not move on between steps, so **advance ``offset`` each step**.
        force_first: the first token is accepted whatever y_1, so that every step accepts some.

    Returns:
        num_accepted [B] int32. A row with a NaN, or whose mixture rules all tokens out, ends the
        prefix, the first one too.

    Raises:
        ValueError, TypeError: a shape, dtype, device or stride that does not fit, by name.
        BackendUnavailable: the named backend cannot run this call.

    >>> import torch, pydecode
    >>> draft, verifier = torch.randn(1, 8, 50), torch.randn(1, 8, 50)
    >>> x = pydecode.sample_and_score(draft, temperature=0.7, sampler="gumbel", seed=3).tokens
    >>> pydecode.coupled_accept(draft, verifier, x, ratio=1.0, temperature=0.7, seed=3).tolist()
    [8]
    """
    draft_logits = arguments.expect_logits("draft_logits", draft_logits)
    expect_dim("draft_logits", draft_logits, 3, "[B, M, V]")
    B, M, V = draft_logits.shape
    device = draft_logits.device
    verifier_logits = arguments.expect_logits("verifier_logits", verifier_logits)
    expect_shape("verifier_logits", verifier_logits, (B, M, V), "[B, M, V]")
    expect_device("verifier_logits", verifier_logits, device)
    tokens = expect_index("tokens", tokens, (B, M), "[B, M]", device)
    ratio = 0.5 if ratio is None else ratio
    temperature = 1.0 if temperature is None else temperature
    if not isinstance(ratio, Tensor) and isinstance(ratio, (int, float)) and ratio > 1:
        raise ValueError(f"ratio: expected at most 1, got {ratio}")
    if checking():
        data_range("tokens", tokens, 0, V)
    args = (
        *(draft_logits, verifier_logits, tokens),
        *number("ratio", ratio, B, device, minimum=0),
        *number("temperature", temperature, B, device, minimum=0),
        *arguments.seeds(seed, offset, B, device),
        arguments.row_positions(positions, (B, M), "[B, M]", device),
        bool(force_first),
        choose("coupled_accept", backend, HAS, draft_logits),
    )
    result: Tensor = binding.call(_op, _run, *args)
    return result


def _run(*args: Any) -> Tensor:
    *args, backend = args  # type: ignore[assignment]
    if backend == "reference":
        return reference.coupled_accept(*args)
    if backend == "triton":
        return triton_kernels("coupled_accept").coupled_accept(*args)
    raise unavailable("coupled_accept", backend)


def _fake(draft_logits: Tensor, *args: Any) -> Tensor:
    return draft_logits.new_empty((draft_logits.shape[0],), dtype=torch.int32)


_op = binding.bind("coupled_accept", _run, _fake)
