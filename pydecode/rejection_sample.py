"""Verification of drafted chains by rejection sampling: the public function and its binding."""

from typing import Any

import torch
from torch import Tensor

from . import binding
from . import verification_arguments as arguments
from .backends import choose, triton_kernels, unavailable
from .reference import rejection_sample as reference
from .replay import replayed
from .results import Verified
from .validation import checking, expect_choice, expect_tensor

HAS = ("reference", "triton")


@replayed
def rejection_sample(
    target_logits: Tensor | None,
    draft_tokens: Tensor,
    draft_logits: Tensor | None = None,
    *,
    draft_probs: Tensor | None = None,
    target_probs: Tensor | None = None,
    num_drafts: int | Tensor | None = None,
    row_index: Tensor | None = None,
    draft_row_index: Tensor | None = None,
    draft_vocab: Tensor | None = None,
    allowed: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    draft_temperature: float | Tensor | None = None,
    filter_draft: bool = True,
    rule: str = "token",
    seed: int | Tensor = 0,
    offset: int | Tensor = 0,
    positions: int | Tensor | None = None,
    uniforms: Tensor | None = None,
    return_logprobs: bool = False,
    return_num_passed: bool = False,
    backend: str | None = None,
) -> Any:
    """Accepts a prefix of G drafted tokens and samples one more; the output's law is the target's.

    ``rule="token"``: draft i is accepted while ``q > 0 and u_i q_i(x_i) < p_i(x_i)``; at the first
    rejection the correction is drawn from norm(relu(p_i - q_i)), after G acceptances a bonus from
    p_G (Leviathan et al., ICML 2023, algorithm 1; Chen et al., 2023).
    ``rule="block"``: with pi_i = min(1, pi_{i-1} p(x_i)/q(x_i)), S_i = sum relu(pi_i p_i - q_i) and
    h_i = S_i / (S_i + 1 - pi_i) (1 where the denominator is under 1e-6), h_G = pi_G: the last i
    with u_i < h_i wins, and the correction comes from norm(relu(pi_i p_i - q_i)) (Sun et al., ICLR
    2025, algorithm 2). It accepts at least as many on average. A zero residual falls back to p.

    Args:
        target_logits: [B, G+1, V], fp16, bf16, fp32 or fp64; row i is the law of draft i, row G of
            the bonus. Or any [rows, V] with ``row_index``. None with ``target_probs``.
        draft_tokens: [B, G] int32/int64, ids of the target's vocabulary. One outside [0, V) is
            absent: the chain ends before it, so the last token is drawn from p itself there.
        draft_logits: [B, G, V], the law that draft i was really drawn from, or any [rows, V] with
            ``draft_row_index``. Neither these nor draft_probs: deterministic drafts (top-k, n-gram,
            retrieval), accepted iff u < p(x), else x is taken out of p; both rules are then one.
        draft_probs, target_probs: the same as probabilities, taken as given (divided by their sum,
            after ``allowed``); no filter and no temperature acts on them but temperature 0.
        num_drafts: int or [B], clipped to [0, G]: drafts of a ragged batch. None: G.
        row_index: [B, G+1] int32/int64, rows of a packed target, -1: no row. A draft without a row
            ends the chain before it. Where the last token has no row, its entry of ``tokens`` is -1
            (an engine with its own bonus); the request is decided all the same.
        draft_row_index: [B, G], the same for the draft law.
        draft_vocab: [Vd] int32/int64: the draft law has Vd columns, column j is target token
            draft_vocab[j] (EAGLE-3); entries outside [0, V) are dropped.
        allowed: [B, G+1, ceil(V/32)] int32, a grammar's bits (bit v % 32 of word v // 32), acting
            on the target only.
        temperature: number or [B]. 0 is greedy for that request: a draft is accepted iff it is the
            target's argmax (lowest index), nothing is drawn and the draft law is not read.
        top_k, top_p, min_p: number or [B], None is off; they act on logits only, in this order.
        draft_temperature: of draft_logits. None: ``temperature``.
        filter_draft: whether draft_logits get the same top_k, top_p and min_p. **q must be the law
            that the drafts were drawn from**: an engine that drafts unfiltered passes False, or the
            result is biased.
        seed: int or 0-d: mixed with the request's batch index. [B]: a request's result does not
            depend on its batch. offset: int, 0-d or [B].
        positions: int, 0-d or [B]: the absolute position of the first draft. None: 0; the caller
            then advances ``offset`` each step. Draws are keyed by (seed, offset, position, i) with
            i the draft's index, -1 for the last token.
        uniforms: [B, G+1] fp32/fp64 in place of the draws, the last token's always in column G. A
            NaN or a negative one counts as 1.
        return_logprobs: also log p of every emitted token under log_softmax(logits / temperature)
            with ``allowed`` and without filters (temperature 0 is read as 1 here).
        return_num_passed: also how many drafts of the chain pass the token rule's test each on its
            own, with its own draw, those after the first rejection included: a statistic of the
            draft model, from which nothing is emitted.

    Returns:
        Verified: ``tokens`` int64 [B, G+1], accepted drafts, the last token, then -1;
        ``num_accepted`` int32 [B]; ``path`` int32 [B, G+1], 0..num_accepted, then -1; ``logprobs``
        [B, G+1] fp32 (fp64 for an fp64 target), 0 where tokens is -1, or None. A request that reads
        a bad row (NaN, nothing allowed, a row index outside the rows) is undecided: tokens and path
        all -1, num_accepted 0. The token rule reads up to the first rejection, the block rule all
        valid rows. With ``return_num_passed`` a pair (Verified, int32 [B]), 0 for an undecided
        request; a bad row that the rule does not read passes nothing.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
        BackendUnavailable: the named backend cannot run this call.

    >>> import torch, pydecode
    >>> logits, draft_logits = torch.randn(2, 4, 50), torch.randn(2, 3, 50)
    >>> drafts = torch.distributions.Categorical(logits=draft_logits).sample()  # unfiltered
    >>> out = pydecode.rejection_sample(
    ...     logits, drafts, draft_logits, top_p=0.9, filter_draft=False, seed=7, positions=20
    ... )
    >>> out.tokens.shape
    torch.Size([2, 4])
    """
    sizes = arguments.chain_sizes(draft_tokens)
    device = draft_tokens.device
    target_logits, target_probs, V = arguments.expect_target(
        target_logits, target_probs, row_index, sizes, device
    )
    draft_logits, draft_probs = arguments.expect_draft(
        draft_logits, draft_probs, draft_row_index, draft_vocab, sizes, V, device
    )
    count = arguments.num_drafts_of(num_drafts, sizes, device)
    expect_choice("rule", rule, ("token", "block"))
    target = target_logits if target_logits is not None else target_probs
    if checking():
        draft = draft_logits if draft_logits is not None else draft_probs
        rows = (expect_tensor("target", target), row_index, draft, draft_row_index, draft_vocab)
        arguments.check_data(draft_tokens, count, V, *rows, first=0)
    args = (
        *(target_logits, draft_tokens, draft_logits, draft_probs, target_probs),
        *count,
        *(row_index, draft_row_index, draft_vocab),
        arguments.expect_allowed(allowed, sizes, V, device),
        *arguments.filters(temperature, top_k, top_p, min_p, sizes.B, device),
        *arguments.draft_temperature_of(draft_temperature, temperature, sizes.B, device),
        *(bool(filter_draft), rule),
        *arguments.random(seed, offset, positions, uniforms, sizes, device),
        *(bool(return_logprobs), bool(return_num_passed)),
        choose("rejection_sample", backend, HAS, target),
    )
    tokens, num_accepted, path, logprobs, num_passed = binding.call(_op, _run, *args)
    verified = Verified(tokens, num_accepted, path, logprobs if return_logprobs else None)
    return (verified, num_passed) if return_num_passed else verified


def _run(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *args, backend = args  # type: ignore[assignment]
    if backend == "reference":
        return reference.rejection_sample(*args)
    if backend == "triton":
        return triton_kernels("rejection_sample").rejection_sample(*args)
    raise unavailable("rejection_sample", backend)


def _fake(
    target_logits: Tensor | None,
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    draft_probs: Tensor | None,
    target_probs: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    target = target_logits if target_logits is not None else target_probs
    assert target is not None
    width = draft_tokens.shape[1] + 1
    results = arguments.fake_verified(draft_tokens, width, target, return_logprobs=args[-3])
    B = draft_tokens.shape[0] if args[-2] else 0
    return (*results, draft_tokens.new_empty((B,), dtype=torch.int32))


_op = binding.bind("rejection_sample", _run, _fake)
