"""One step of unmasking: the public function, its checks and its binding."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import binding
from . import sampling_arguments as arguments
from .backends import choose, unavailable
from .reference import unmask as reference
from .reference.numbers import compute_dtype
from .replay import replayed
from .results import Unmasked
from .validation import checking, expect_device, expect_dim, expect_shape

HAS = ("reference", "triton")


@replayed
def unmask(
    tokens: Tensor,
    logits: Tensor,
    *,
    mask_id: int,
    masked: Tensor | None = None,
    rule: str = "top_k",
    shift: int = 0,
    window: tuple[int | Tensor, int] | None = None,
    external_score: Tensor | None = None,
    out: Tensor | None = None,
    k: int | Tensor = 1,
    threshold: float | Tensor = 0.9,
    slack: float | Tensor = 0.0,
    factor: float | Tensor = 1.0,
    low: float | Tensor = 0.4,
    keep: float | Tensor = 0.0,
    strict: bool = False,
    min_commit: int | None = None,
    max_commit: int | None = None,
    temperature: float | Tensor = 0.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    confidence: str = "probability",
    tempered: bool = False,
    exclude_ids: int | Sequence[int] | Tensor | None = None,
    allowed: Tensor | None = None,
    sampler: str = "inverse_cdf",
    seed: int | Tensor = 0,
    offset: int | Tensor = 0,
    positions: Tensor | None = None,
    uniforms: Tensor | None = None,
    filter_order: str = "top_k_first",
    bias_ids: Tensor | None = None,
    bias: Tensor | None = None,
    return_proposals: bool = False,
    backend: str | None = None,
) -> Any:
    """Fills some masked positions of a window from one forward's logits.

    Each masked row of the window gets a token and a confidence c, as in ``sample_and_score``, and a
    rule commits some of them (LLaDA, Nie et al., 2025, section 2.4; Fast-dLLM, Wu et al., 2025,
    section 3.3). With c_(1) >= c_(2) >= .. over those rows, ties to the lowest position:

    ============= ====================================================================== ==========
    rule          commits                                                                order
    ============= ====================================================================== ==========
    top_k         c_(1..k); k=1 is stepwise                                              confidence
    threshold     {c >= threshold}; slack > 0: {c >= min(threshold, c_(1) - slack)}      confidence
    factor        all before the first n >= 2 with c_(n) < 1 - factor/(n+1)              confidence
    entropy       {H <= threshold}                                                       lowest H
    entropy_bound ascending H while the sum of the earlier H <= threshold                lowest H
    prefix        the run of c >= threshold over masked rows, from the leftmost one      leftmost
    sequential    the k leftmost                                                         leftmost
    segments      best of each run of adjacent masked rows if c > low; all c > threshold confidence
    posterior     each with probability 1 - keep                                         position
    external      {external_score > threshold}                                           that score
    ============= ====================================================================== ==========

    In every rule at least ``min_commit`` and at most ``max_commit`` rows are committed, filled and
    cut in the rule's order, never more than can be: so a loop of this op ends, as ``mask_id`` is
    never a choice.

    Args:
        tokens: [B, L] int64; rows that equal ``mask_id`` are masked.
        logits: [B, L, V], the whole whatever the window; or the window's rows [B, length, V], row j
            is position start[b] + j; or with ``shift=1`` [B, length+1, V], which start one earlier.
            fp16, bf16, fp32 or fp64; any strides but the last.
        mask_id: counts as a logit of -inf, like ``exclude_ids``; outside [0, V) nothing is.
        masked: [B, L] bool, the masked rows, whatever their tokens: for an engine that keeps track
            of them itself. None: those that equal ``mask_id``.
        shift: 1 takes position i's token from row i-1, the first from its own first row (Dream,
            Fast-dLLM v2), without a copy. [B, length, V] gives the window's first position its own
            first row.
        window: (start, length): start int, 0-d or [B], length int; clipped to [0, L). None: all.
        external_score: [B, L] floats for rule="external"; a NaN is never committed.
        out: [B, L] int64, takes the new tokens and is ``Unmasked.tokens``; may be ``tokens``.
        k, threshold, slack, factor, low, keep: number, 0-d or [B]. ``threshold`` is an entropy in
            nats for the entropy rules, which usually want less than the default (dParallel 0.5).
        strict: > in place of >= (and < in place of <= for entropies), in threshold, prefix, entropy
            and entropy_bound; segments, external and factor are as the table says.
        min_commit: default 1, for posterior 0. max_commit: default no limit. Both static.
        temperature .. uniforms: as in ``sample_and_score``; ``allowed`` [B, L, ceil(V/32)],
            ``positions`` and ``uniforms`` [B, L] belong to the position that the token goes to.
            ``positions=None`` is the index in L, window or not: it does not move on between steps,
            so **advance ``offset`` each step**. ``uniforms`` are the sampler's; the posterior rule
            draws its own. The entropy rules take ``confidence="neg_entropy"`` whatever is given.
        filter_order, bias_ids, bias: as in ``sample_and_score``. A bias belongs to its row of
            logits, not to the position that the token goes to: [B, L|length|length+1, n], as many
            rows as the logits have.
        return_proposals: also what every row that was read proposes, committed or not.

    Returns:
        ``Unmasked(tokens, committed, num_committed, num_left, confidence)``: [B, L] int64, [B, L]
        bool, [B] int32, masks left in the window [B] int32, and [B, L] fp32 (fp64 for fp64 logits),
        -inf where no row was read. A masked row with a NaN or with nothing allowed never commits,
        has confidence -inf, and ends a prefix. With ``return_proposals`` a pair (Unmasked,
        int64 [B, L]): the token of each masked row of the window, ``tokens`` in the others and
        where nothing could be chosen.

    Raises:
        ValueError, TypeError: a shape, dtype, device, stride or choice that does not fit, by name.
        BackendUnavailable: the named backend cannot run this call.

    >>> import torch, pydecode
    >>> tokens = torch.tensor([[5, 9, 9, 9]])
    >>> logits = torch.zeros(1, 4, 10)
    >>> logits[0, 1, 3], logits[0, 2, 7], logits[0, 3, 9] = 8.0, 6.0, 20.0
    >>> step = pydecode.unmask(tokens, logits, mask_id=9, rule="threshold", threshold=0.9)
    >>> step.tokens.tolist(), step.num_left.tolist()
    ([[5, 3, 7, 9]], [1])
    """
    tokens = arguments.expect_tokens("tokens", tokens)
    logits = arguments.expect_logits("logits", logits)
    B, L = tokens.shape
    V, device = logits.shape[-1], logits.device
    mask_id = arguments.token_id("mask_id", mask_id)
    if isinstance(shift, bool) or shift not in (0, 1):
        raise ValueError(f"shift: expected 0 or 1, got {shift!r}")
    where = arguments.window_of(window, B, device)
    _expect_rows(logits, B, L, where[2], shift)
    expect_device("tokens", tokens, device)
    chosen = choose("unmask", backend, HAS, logits)
    if external_score is not None:
        choose("unmask", backend, HAS, external_score)  # of a dtype that kernels compare
    args = (
        *(tokens, logits, mask_id, arguments.masked_rows(masked, tokens), shift, *where),
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
        *arguments.row_sampling(
            (B, L),
            "B, L",
            B,
            V,
            device,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            filter_order=filter_order,
            confidence=confidence,
            tempered=tempered,
            exclude_ids=exclude_ids,
            bias_ids=bias_ids,
            bias=bias,
            bias_rows=logits.shape[:-1],
            bias_symbols="the logits' rows",
            allowed=allowed,
            sampler=sampler,
            seed=seed,
            offset=offset,
            positions=positions,
            uniforms=uniforms,
            check=checking(),
        ),
        bool(return_proposals),
        chosen,
    )
    if out is None:
        *results, proposals = binding.call(_op, _run, *args)
        result = Unmasked(*results)
        return (result, proposals) if return_proposals else result
    out = arguments.expect_tokens("out", out)
    expect_shape("out", out, (B, L), "[B, L]")
    expect_device("out", out, device)
    _, *fresh, proposals = _fake(*args)
    result = Unmasked(out, *fresh)
    given = result._asdict() | {"proposals": proposals}
    binding.call(_op_out, _run_out, *args, **{f"out_{name}": x for name, x in given.items()})
    return (result, proposals) if return_proposals else result


def _expect_rows(logits: Tensor, B: int, L: int, length: int, shift: int) -> None:
    expect_dim("logits", logits, 3, "[B, L, V]")
    rows = {"L": L}
    if length >= 0:
        rows["length"] = length
        if shift:
            rows["length+1"] = length + 1
    if logits.shape[0] != B or logits.shape[1] not in rows.values():
        raise ValueError(
            f"logits: expected shape [B, {'|'.join(rows)}, V] = "
            f"[{B}, {'|'.join(map(str, rows.values()))}, V], got {list(logits.shape)}"
        )


def _run(*args: Any) -> reference.Proposed:
    *args, backend = args  # type: ignore[assignment]
    if backend == "reference":
        return reference.unmask(*args)
    if backend == "triton":
        from .triton_kernels import unmask as triton

        return triton.unmask(*args)
    raise unavailable("unmask", backend, HAS)


def _run_out(*args: Any, **out: Tensor) -> None:
    given = tuple(out.values())
    if args[-1] == "triton" and all(x.is_contiguous() for x in given[1:]):
        from .triton_kernels import unmask as triton

        triton.unmask(*args[:-1], into=given)
        return
    for result, x in zip(_run(*args), given):
        x.copy_(result)


def _fake(tokens: Tensor, logits: Tensor, *args: Any) -> reference.Proposed:
    B, L = tokens.shape
    *_, return_proposals, _ = args
    return (
        tokens.new_empty((B, L)),
        tokens.new_empty((B, L), dtype=torch.bool),
        tokens.new_empty((B,), dtype=torch.int32),
        tokens.new_empty((B,), dtype=torch.int32),
        tokens.new_empty((B, L), dtype=compute_dtype(logits.dtype)),
        tokens.new_empty((B, L) if return_proposals else (0,)),
    )


_op = binding.bind("unmask", _run, _fake)
_op_out = binding.bind_out("unmask", _run_out)
