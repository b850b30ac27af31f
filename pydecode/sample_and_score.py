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
from .results import Scores
from .validation import checking


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
    backend: str | None = None,
) -> Scores:
    """Samples a token from every row of logits and scores how sure the model is of it.

    ``x_i ~ filtered(softmax(l_i / T))`` and ``c_i = softmax(l_i)[x_i]`` (LLaDA, Nie et al., 2025,
    section 2.4): the confidence is of the un-tempered, unfiltered law unless ``tempered``.

    Args:
        logits: [..., V], fp16, bf16, fp32 or fp64; any strides but the last. [B, V] is B requests
            of one row, in [..., L, V] all leading dimensions but L belong to B.
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
    rows = logits.shape[:-1]
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
        confidence=confidence,
        tempered=tempered,
        exclude_ids=exclude_ids,
        allowed=allowed,
        sampler=sampler,
        seed=seed,
        offset=offset,
        positions=positions,
        uniforms=uniforms,
        check=checking(),
    )
    args = (logits, *sampling, choose("sample_and_score", backend))
    return Scores(*binding.call(_op, _run, *args))


def _run(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *args, backend = args  # type: ignore[assignment]
    if backend == "reference":
        return reference.sample_and_score(*args)
    raise unavailable("sample_and_score", backend)


def _fake(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = logits.shape[:-1], compute_dtype(logits.dtype)
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
    )


_op = binding.bind("sample_and_score", _run, _fake)
