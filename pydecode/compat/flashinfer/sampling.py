"""``flashinfer.sampling`` on pydecode: verified chains, and tokens of logits or probabilities."""

from typing import Any

import torch
from torch import Tensor

import pydecode

ORDERS = ("top_k_first", "joint")


def chain_speculative_sampling(
    draft_probs: Tensor,
    draft_token_ids: Tensor,
    target_probs: Tensor,
    maybe_output_accepted_token_num: Tensor | None = None,
    maybe_output_emitted_draft_token_num: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Accepts a prefix of n drafted tokens and samples one more, on ``rejection_sample``.

    Replaces ``flashinfer.sampling.chain_speculative_sampling`` (seen at fb28d7242, August 2026).

    Args:
        draft_probs: [B, n, V], fp16 to fp64, read as they are (theirs makes fp32 copies).
        draft_token_ids: [B, n] int32/int64. One outside [0, V), such as the padding -1, ends the
            chain before it, and the last token is drawn from the target's own row there.
        target_probs: [B, n+1, V]. Rows are divided by their sum, also of draft_probs.
        maybe_output_accepted_token_num, maybe_output_emitted_draft_token_num: [B] counters of any
            integer dtype, to which this call's numbers are added, and which are then returned.
        deterministic: always so, bit for bit.
        generator: without a seed, one ``torch.rand`` call draws from it; None: torch's own.
        seed, offset: both or neither; ints, or int64/uint64 tensors [1] or [B]. With [B] a
            request's result does not depend on its batch. The caller advances the offset.

    Returns:
        (output_token_ids int32 [B, n+1], accepted drafts, the correction or bonus, then -1;
        accepted [B]; emitted [B], without the correction or bonus), counts int32 if fresh.
        ``accepted`` counts the drafts that pass each on its own.

    Where ours differs: every request uses its own seed and offset (theirs reads entry 0 of [B]
    tensors), and int64 counters are counted in (theirs counts in an int32 copy). In ``accepted``
    theirs gives a rejected draft a second draw, so overstates the rate; ours gives each draft one.
    A draft of draft probability 0 is never accepted, since it cannot have been drawn. An all-zero
    residual falls back to the target's row, and a row that is read and holds a NaN leaves the
    request undecided: all -1, emitted 0 (theirs: an arbitrary id in both). Draft ids are never an
    index out of bounds.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name; a seed without an offset.

    >>> import torch
    >>> from pydecode.compat.flashinfer import chain_speculative_sampling
    >>> draft = torch.tensor([[[0.1, 0.2, 0.3, 0.4], [0.2, 0.3, 0.4, 0.1]]])
    >>> target = torch.tensor([[[0.0, 0.1, 0.9, 0.0], [1.0, 0.0, 0.0, 0.0], [0.7, 0.1, 0.1, 0.1]]])
    >>> ids, accepted, emitted = chain_speculative_sampling(draft, torch.tensor([[2, 1]]), target)
    >>> ids, emitted
    (tensor([[ 2,  0, -1]], dtype=torch.int32), tensor([1], dtype=torch.int32))
    """
    if draft_token_ids.dim() != 2:
        raise ValueError(f"draft_token_ids: expected [B, n], got {list(draft_token_ids.shape)}")
    B, n = draft_token_ids.shape
    device = draft_token_ids.device
    verified, passed = pydecode.rejection_sample(
        None,
        draft_token_ids,
        draft_probs=draft_probs,
        target_probs=target_probs,
        return_num_passed=True,
        **_draws((B, n + 1), device, generator, seed, offset),
    )
    return (
        verified.tokens.int(),
        _count("maybe_output_accepted_token_num", maybe_output_accepted_token_num, passed),
        _count(
            "maybe_output_emitted_draft_token_num",
            maybe_output_emitted_draft_token_num,
            verified.num_accepted,
        ),
    )


def top_k_top_p_sampling_from_logits(
    logits: Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    indices: Tensor | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
) -> Tensor:
    """A token of each row's top-k and top-p law, on ``sample_and_score``.

    Replaces ``flashinfer.sampling.top_k_top_p_sampling_from_logits`` (seen at fb28d7242). Logits
    are read once: no mask, no softmax and no copy of vocabulary size is written.

    Args:
        logits: [B, V], fp16 to fp64; [rows, V] with ``indices``.
        top_k, top_p: a number or [B]. A top_k <= 0 or >= V, a top_p >= 1 are off.
        indices: [B] int32/int64, the row of each output. -1: no row, and -1 comes out.
        filter_apply_order: "top_k_first": top-p acts on what top-k left. "joint": both on the
            whole law.
        check_nan: raise on a NaN among the logits. **This synchronises.**
        deterministic, generator, seed, offset: as in ``chain_speculative_sampling``.

    Returns:
        tokens [B], int32, or of ``indices``' dtype. A row with a NaN, or all -inf, gives -1.

    Where ours differs: supports are value thresholds in every path, so logits that tie with the
    k-th are kept (theirs keeps exactly k of them in its fast path for a small k); ``top_k [B]``
    belongs to the outputs also beside ``indices`` (theirs masks the rows by it).

    Raises:
        ValueError, TypeError: an argument that does not fit, by name; a NaN under ``check_nan``.
    """
    if filter_apply_order not in ORDERS:
        raise ValueError(
            f"filter_apply_order: expected one of {', '.join(ORDERS)}, got {filter_apply_order!r}"
        )
    _expect_rows("logits", logits, check_nan)
    how = dict(top_k=top_k, top_p=top_p, filter_order=filter_apply_order)
    return _sample(logits, indices, generator, seed, offset, **how)[1]


def sampling_from_logits(
    logits: Tensor,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
) -> Tensor:
    """A token of softmax(logits) for each row, on ``sample_and_score``.

    Replaces ``flashinfer.sampling.sampling_from_logits`` (seen at fb28d7242): arguments, results
    and errors as in ``top_k_top_p_sampling_from_logits``. One draw a row, by inverse CDF (theirs
    draws Gumbel noise for each entry).
    """
    _expect_rows("logits", logits, check_nan)
    return _sample(logits, indices, generator, seed, offset)[1]


def sampling_from_probs(
    probs: Tensor,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A token of each row of probabilities: the bonus of a chain without drafts.

    Replaces ``flashinfer.sampling.sampling_from_probs`` (seen at fb28d7242): arguments, results and
    errors as in ``top_k_top_p_sampling_from_logits``. Rows are divided by their sum. A row with a
    NaN or a negative entry, or without mass, gives -1 (theirs: an arbitrary id), and False in
    ``valid``, bool [B], which ``return_valid`` adds.
    """
    _expect_rows("probs", probs, check_nan)
    tokens, samples = _sample(probs, indices, generator, seed, offset, probs=True)
    return (samples, tokens >= 0) if return_valid else samples


def _sample(
    rows: Tensor,
    indices: Tensor | None,
    generator: torch.Generator | None,
    seed: int | Tensor | None,
    offset: int | Tensor | None,
    **how: Any,
) -> tuple[Tensor, Tensor]:
    """The tokens [B] as the operator gives them, and in the peer's dtype."""
    shape = rows.shape[:1] if indices is None else indices.shape
    tokens = pydecode.sample_and_score(
        rows,
        temperature=1.0,
        row_index=indices,
        **how,
        **_draws(shape, rows.device, generator, seed, offset),
    ).tokens
    return tokens, tokens.int() if indices is None else tokens.to(indices.dtype)


def _draws(
    shape: tuple[int, ...],
    device: torch.device,
    generator: torch.Generator | None,
    seed: int | Tensor | None,
    offset: int | Tensor | None,
) -> dict[str, Any]:
    """The operator's arguments: uniforms of torch's generator, or seed and offset."""
    if seed is None and offset is None:
        return {"uniforms": torch.rand(*shape, generator=generator, device=device)}
    if seed is None or offset is None:
        # theirs draws from the generator then, and drops the one that was given
        raise ValueError("seed, offset: expected both or neither, got one of them")
    return {"seed": _number(seed, shape[0]), "offset": _number(offset, shape[0])}


def _number(value: int | Tensor, B: int) -> int | Tensor:
    """A tensor [1] for a batch is one number, 0-d, which the operators mix with the row."""
    if not isinstance(value, Tensor):
        return value
    if value.dtype == torch.uint64:
        value = value.view(torch.int64)
    return value[0] if value.shape == (1,) and B != 1 else value


def _count(name: str, counter: Tensor | None, counts: Tensor) -> Tensor:
    if counter is None:
        return counts
    if counter.shape != counts.shape:
        raise ValueError(f"{name}: expected [B] = {list(counts.shape)}, got {list(counter.shape)}")
    return counter.add_(counts)


def _expect_rows(name: str, x: Tensor, no_nan: bool) -> None:
    if x.dim() != 2:
        raise ValueError(f"{name}: expected [B, V], got shape {list(x.shape)}")
    if no_nan and bool(x.isnan().any()):
        raise ValueError(f"{name}: expected no NaN, as check_nan asks for")
