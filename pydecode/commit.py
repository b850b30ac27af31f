"""The commit rules alone: the public function, its checks and its binding."""

from typing import Any

import torch
from torch import Tensor

from . import binding
from . import sampling_arguments as arguments
from .backends import choose, unavailable
from .reference import commit as reference
from .reference.numbers import compute_dtype
from .reference.unmask import Result
from .replay import replayed
from .results import Unmasked
from .validation import expect_index

HAS = ("reference", "triton")


@replayed
def commit(
    tokens: Tensor,
    proposals: Tensor,
    scores: Tensor,
    *,
    mask_id: int,
    rule: str = "top_k",
    window: tuple[int | Tensor, int] | None = None,
    external_score: Tensor | None = None,
    k: int | Tensor = 1,
    threshold: float | Tensor = 0.9,
    slack: float | Tensor = 0.0,
    factor: float | Tensor = 1.0,
    low: float | Tensor = 0.4,
    keep: float | Tensor = 0.0,
    strict: bool = False,
    min_commit: int | None = None,
    max_commit: int | None = None,
    seed: int | Tensor = 0,
    offset: int | Tensor = 0,
    positions: Tensor | None = None,
    uniforms: Tensor | None = None,
    backend: str | None = None,
) -> Unmasked:
    """Commits proposed tokens at some masked positions of a window, by one of ``unmask``'s rules.

    ``unmask`` without its reading of logits, for an engine that has tokens and scores already. The
    rules and their arguments are the table of ``unmask`` (Fast-dLLM, Wu et al., 2025, section 3.3,
    and the others named there).

    Args:
        tokens: [B, L] int64; rows that equal ``mask_id`` are masked.
        proposals: [B, L] int32 or int64, a token for each masked row. A negative one (no token), or
            one that is ``mask_id``, is never committed.
        scores: [B, L] floats, larger is better; -H for the entropy rules, which
            ``confidence="neg_entropy"`` returns. A NaN is never committed.
        window, external_score, k .. max_commit: as in ``unmask``.
        seed, offset, positions: keys of the posterior rule's draws, as in ``unmask``; where
            positions do not move on between steps, **advance ``offset`` each step**.
        uniforms: [B, L] fp32 or fp64, the posterior rule's draws in place of the seeded ones: a row
            commits iff u >= keep.

    Returns:
        ``Unmasked(tokens, committed, num_committed, num_left, confidence)`` as ``unmask``; its
        confidence is ``scores`` in fp32 (fp64 for fp64) at masked rows of the window that can be
        committed, -inf elsewhere.

    Raises:
        ValueError, TypeError: a shape, dtype, device or choice that does not fit, by name.
        BackendUnavailable: the named backend cannot run this call.

    >>> import torch, pydecode
    >>> tokens, proposals = torch.tensor([[5, 9, 9, 9]]), torch.tensor([[1, 2, 3, 4]])
    >>> scores = torch.tensor([[0.9, 0.5, 0.8, 0.8]])
    >>> pydecode.commit(tokens, proposals, scores, mask_id=9, rule="top_k", k=1).tokens.tolist()
    [[5, 9, 3, 9]]
    """
    tokens = arguments.expect_tokens("tokens", tokens)
    B, device = tokens.shape[0], tokens.device
    proposals = expect_index("proposals", proposals, tokens.shape, "[B, L]", device)
    scores = arguments.expect_scores("scores", scores, tokens)
    chosen = choose("commit", backend, HAS, scores)
    if external_score is not None:
        choose("commit", backend, HAS, external_score)  # of a dtype that kernels compare
    args = (
        *(tokens, proposals, scores, arguments.token_id("mask_id", mask_id)),
        *arguments.window_of(window, B, device),
        arguments.external_scores(external_score, rule, tokens),
        *arguments.rule_arguments(
            rule,
            B,
            device,
            k=k,
            threshold=threshold,
            slack=slack,
            factor=factor,
            low=low,
            keep=keep,
            strict=strict,
            min_commit=min_commit,
            max_commit=max_commit,
        ),
        *arguments.seeds(seed, offset, B, device),
        arguments.row_positions(positions, tokens.shape, "[B, L]", device),
        arguments.row_uniforms(uniforms, tokens.shape, "[B, L]", device),
        chosen,
    )
    return Unmasked(*binding.call(_op, _run, *args))


def _run(*args: Any) -> Result:
    *args, backend = args  # type: ignore[assignment]
    if backend == "reference":
        return reference.commit(*args)
    if backend == "triton":
        from .triton_kernels import commit as triton

        return triton.commit(*args)
    raise unavailable("commit", backend, HAS)


def _fake(tokens: Tensor, proposals: Tensor, scores: Tensor, *args: Any) -> Result:
    B, L = tokens.shape
    return (
        tokens.new_empty((B, L)),
        tokens.new_empty((B, L), dtype=torch.bool),
        tokens.new_empty((B,), dtype=torch.int32),
        tokens.new_empty((B,), dtype=torch.int32),
        tokens.new_empty((B, L), dtype=compute_dtype(scores.dtype)),
    )


_op = binding.bind("commit", _run, _fake)
