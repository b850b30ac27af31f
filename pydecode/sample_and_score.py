"""Sampling and scoring of rows of logits: the public function, its checks and its binding."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import binding
from . import sampling_arguments as arguments
from .backends import choose, unavailable
from .reference import sample_and_score as reference
from .reference.numbers import compute_dtype
from .replay import replayed
from .results import Scores
from .validation import (
    INTS,
    checking,
    data_range,
    expect_device,
    expect_dim,
    expect_dtype,
    expect_tensor,
)

HAS = ("reference", "triton")


@replayed
def sample_and_score(
    logits: Tensor,
    *,
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
    row_index: Tensor | None = None,
    probs: bool = False,
    filter_order: str = "top_k_first",
    bias_ids: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Scores:
    """Samples a token from every row of logits and scores how sure the model is of it.

    ``x_i ~ filtered(softmax(l_i / T))`` and ``c_i = softmax(l_i)[x_i]`` (LLaDA, Nie et al., 2025,
    section 2.4): the confidence is of the un-tempered, unfiltered law unless ``tempered``.

    Args:
        logits: [..., V], fp16, bf16, fp32 or fp64; any strides but the last. [B, V] is B requests
            of one row, in [..., L, V] all leading dimensions but L belong to B. [rows, V] with
            ``row_index``.
        temperature, top_k, top_p, min_p: number, 0-d or [B]. Temperature 0 takes the argmax (ties:
            the lowest id). Filters run in this order, their supports are value thresholds (ties
            share their fate); off: None, top_k <= 0 or >= V, top_p >= 1, min_p <= 0.
        confidence: of a row's law p: "probability" p[x]; "margin" p_(1) - p_(2), the two largest;
            "neg_entropy" sum p log p (nats); "random" a uniform draw of a stream of its own.
        tempered: take the law that was sampled from, with temperature and filters (Dream, SDAR). At
            temperature 0, where nothing is drawn, that is the filtered law at temperature 1, as in
            Dream (a point mass would rank nothing).
        exclude_ids: an int, a sequence of ints, or an int tensor [n] or [B, n] (ids outside [0, V),
            such as -1, exclude nothing): logits of -inf, out of the choice, the softmax, the
            entropy and the lse.
        allowed: int32 bits [..., ceil(V/32)], a grammar's mask: bit v % 32 of word v // 32 allows
            v; other tokens count as -inf.
        sampler: "inverse_cdf" takes one uniform a row and the smallest v with cumsum(p)[v] > u;
            "gumbel" one draw a vocabulary entry, argmax(l/T + g): noise keyed by position and token
            that ``coupled_accept`` regenerates.
        seed, offset: int, 0-d or [B]. A [B] seed makes a request's result independent of its batch;
            a scalar seed is mixed with the request's index in the batch.
        positions: [...], int32 or int64, keys of the draws. None: the index in L (0 for [B, V]).
            These do not move on between steps, so **advance ``offset`` each step**.
        uniforms: [...], fp32 or fp64, the draws of "inverse_cdf" in place of the seeded ones.
        row_index: [...], int32 or int64: the row of logits [rows, V] that each result is read from,
            so that an engine's packed rows need no copy. Results, and all that is [...] above, have
            its shape, [B] or [..., L]. -1 is no row: nothing is read, token -1, confidence and lse
            -inf. So is a row outside [0, rows), which is bad device data.
        probs: the rows are probabilities, read as logits log p: they need not sum to 1, lse is the
            logarithm of their sum, and a row with a negative entry is like one with a NaN.
        filter_order: "top_k_first": top-p acts on what top-k left, renormalised. "joint": both act
            on the whole law, as FlashInfer's "joint" and Dream's top-p-then-top-k do. min-p is
            relative to the largest, so the same in both.
        bias_ids, bias: [..., n] int32 or int64, and floats: added to the logits before all else, so
            part of the choice, the confidence and the lse. Ids outside [0, V), such as -1, add
            nothing; an id named twice adds twice; -inf forbids, like ``exclude_ids``.

    Returns:
        ``Scores(tokens, confidence, lse)``, each [...]: int64, and fp32 (fp64 for fp64 logits).
        ``lse`` is the natural log-sum-exp of the un-tempered logits after exclusion. Several +inf
        logits share the mass. A row with a NaN, with nothing allowed, or of a negative or NaN
        temperature has token -1 and confidence -inf; its lse is what logsumexp gives (NaN, -inf).

    Raises:
        ValueError, TypeError: a shape, dtype, device, stride or choice that does not fit, by name.
        BackendUnavailable: the named backend cannot run this call.

    >>> import torch, pydecode
    >>> scores = pydecode.sample_and_score(torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 0.0]]))
    >>> scores.tokens.tolist()
    [1, 0]
    >>> [round(c, 3) for c in scores.confidence.tolist()]
    [0.665, 0.488]
    """
    logits = arguments.expect_logits("logits", logits)
    rows = logits.shape[:-1] if row_index is None else _expect_rows(row_index, logits)
    sampling = arguments.row_sampling(
        rows,
        "...",
        arguments.batch_of(rows),
        logits.shape[-1],
        logits.device,
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
        bias_rows=rows,
        bias_symbols="...",
        allowed=allowed,
        sampler=sampler,
        seed=seed,
        offset=offset,
        positions=positions,
        uniforms=uniforms,
        check=checking(),
    )
    chosen = choose("sample_and_score", backend, HAS, logits)
    return Scores(*binding.call(_op, _run, logits, row_index, bool(probs), *sampling, chosen))


def _expect_rows(row_index: Any, logits: Tensor) -> torch.Size:
    """The results' shape when an index picks the rows."""
    row_index = expect_tensor("row_index", row_index)
    expect_dtype("row_index", row_index, INTS)
    expect_device("row_index", row_index, logits.device)
    expect_dim("logits", logits, 2, "[rows, V] (as row_index is given)")
    if checking():
        data_range("row_index", row_index, -1, logits.shape[0])
    return row_index.shape


def _run(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *args, backend = args  # type: ignore[assignment]
    if backend == "reference":
        return reference.sample_and_score(*args)
    if backend == "triton":
        from .triton_kernels import sample_and_score as triton

        return triton.sample_and_score(*args)
    raise unavailable("sample_and_score", backend, HAS)


def _fake(logits: Tensor, row_index: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[:-1] if row_index is None else row_index.shape
    dtype = compute_dtype(logits.dtype)
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
    )


_op = binding.bind("sample_and_score", _run, _fake)
