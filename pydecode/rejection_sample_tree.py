"""Verification of a draft tree by rejection sampling: the public function, checks and binding."""

from typing import Any

from torch import Tensor

from . import binding
from . import verification_arguments as arguments
from .backends import choose, unavailable
from .reference import rejection_sample_tree as reference
from .replay import replayed
from .results import Verified
from .schemas import argument_names
from .validation import checking, expect_choice, static_number

RULES = (
    "recursive",
    "without_replacement",
    "k_seq",
    "traversal",
    "traversal_without_replacement",
    "target_only",
)
HAS = ("reference", "triton")


@replayed
def rejection_sample_tree(
    target_logits: Tensor | None,
    draft_tokens: Tensor,
    parents: Tensor,
    draft_probs: Tensor | None = None,
    *,
    draft_logits: Tensor | None = None,
    max_depth: int | None = None,
    rule: str = "recursive",
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
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
    seed: int | Tensor = 0,
    offset: int | Tensor = 0,
    positions: int | Tensor | None = None,
    uniforms: Tensor | None = None,
    return_logprobs: bool = False,
    backend: str | None = None,
) -> Verified:
    """Accepts a path of a draft tree and samples one more token, so that the target's law is kept.

    With p the target's law after a node, q the law its children were drawn from and u a uniform of
    the tested node:

    - ``"recursive"``: p' = p; children in index order: accept x if q(x) > 0 and u q(x) < p'(x),
      else p' <- norm((p' - q)+), where a zero residual leaves p'; none accepted: sample p'
      (SpecInfer, Miao et al., ASPLOS 2024, alg. 2).
    - ``"without_replacement"``: the same with q', where q'(x) <- 0, renormalised, after a rejection
      (Sequoia, Chen et al., 2024). A sibling that repeats a token has q' = 0 and is rejected.
    - ``"k_seq"``: accept x if u rho q(x) < p(x), for each of the k children; none accepted: sample
      p - min(q, p/rho) (1 - (1-beta)^k) / beta (SpecTr, Sun et al., NeurIPS 2023, alg. 2), with
      beta = sum min(q, p/rho), and rho from 24 halvings of [1, k].
    - ``"traversal"``, ``"traversal_without_replacement"``: leaf first; a node's acceptance is
      a = min(1, a_parent p'(x)/q'(x)); a rejected leaf leaves its parent p' <- norm((a p' - q')+),
      of mass S, and a <- S/(S + 1 - a), but 1 for the root (Weng et al., NeurIPS 2025, alg. 1). On
      a chain it is block verification.
    - ``"target_only"``: reads no draft law. A node's uniform serves all its children: s += p(x) (a
      token already tried adds 0), accept the first x with u max(threshold_acc, 1e-9) < s or
      p(x) >= threshold_single; none: sample p less the tried tokens. Exact at thresholds 1.

    Children must be i.i.d. from q for recursive, k_seq and traversal (equal tokens may repeat), and
    drawn without replacement for the two rules of that name. **Without a draft law** the drafts are
    deterministic (top-k, n-gram, retrieval): every rule but target_only then accepts x with
    probability p'(x), else p'(x) <- 0, renormalised. Testing such drafts by their q is biased.

    Args:
        target_logits: [B, T, V], row n: after node n; or any [rows, V] with ``row_index``. None if
            ``target_probs`` (the same shapes; divided by their sum, not filtered) is given.
        draft_tokens: [B, T] int32/int64 target ids; node 0 is the last committed token. A node
            whose id is outside [0, V) does not exist, nor do those below it.
        parents: [B|1, T] int32/int64, parents[b, 0] = -1, each parent before its children. A node
            whose parent is negative or not before it does not exist, nor do those below it.
        draft_probs, draft_logits: [B, T, V], row n: the law that node n's children were drawn from
            (rows of leaves are not read), or any [rows, V] with ``draft_row_index``; at most one.
        max_depth: Python int, the outputs' width less one; deeper nodes do not exist. None: T - 1.
        threshold_single, threshold_acc: of target_only; below 1 they accept more, at a bias.
        num_drafts: int or [B], nodes after the root of a ragged batch, clipped to the tree.
        row_index: [B, T] int32/int64, rows of the packed target. -1: no row: the node is not tested
            against, so its children do not exist; if the last token would be sampled from it, that
            entry of ``tokens`` stays -1 for the caller, and the request is decided.
        draft_row_index: [B, T], likewise; a node with draft row -1 has no children.
        draft_vocab: [Vd] int32/int64, the draft law's column j is target token draft_vocab[j].
        allowed: int32 bits [B, T, ceil(V/32)], a grammar's mask of the target (bit v % 32 of word
            v // 32 allows v).
        temperature, top_k, top_p, min_p: number or [B], in this order, of logits only. Temperature
            0 is greedy: from the root, the first child that is the target's argmax; nothing is
            drawn and the draft law is not read.
        draft_temperature: of draft_logits; None: as the target. filter_draft: whether the filters
            made q as well. An engine that drafts unfiltered passes False, else q is not the law
            that its drafts were drawn from, and the result is biased.
        seed, offset, positions: int or [B]: the draws' key (``pydecode.philox``). positions: of the
            first drafted token (None: 0; then the caller advances ``offset`` each step). A [B] seed
            makes a request independent of its batch; a scalar one is mixed with its batch index.
        uniforms: [B, T+1] fp32/fp64 in place of these draws: node i in column i (target_only: its
            parent's column), the last token in column T. NaN or negative ones count as 1.
        return_logprobs: log-probabilities of the emitted tokens under the law without filters.

    Returns:
        Verified: tokens int64 and path int32 [B, max_depth+1], num_accepted int32 [B], logprobs
        fp32 (fp64 for fp64 inputs; 0 where tokens is -1) or None. ``tokens[b, :num_accepted[b]+1]``
        is to be emitted, ``path`` lists the accepted nodes from the root (0) on; the rest is -1.
        *Undecided* (tokens, path all -1, num_accepted 0) is a request that reads a row with NaN,
        with nothing allowed, or outside the packed rows: rows of the walked path (a draft row if a
        child is tested there), for traversal rules rows of all existing nodes (draft rows of
        parents). Greedy requests and deterministic drafts walk from the root under every rule.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
        BackendUnavailable: the named backend cannot run this call.

    >>> import torch, pydecode
    >>> target = torch.tensor([[0.2, 0.8], [1.0, 0.0], [0.5, 0.5]]).log()[None]
    >>> tokens, parents = torch.tensor([[0, 1, 0]]), torch.tensor([[-1, 0, 1]])
    >>> pydecode.rejection_sample_tree(target, tokens, parents, temperature=0.0).tokens
    tensor([[1, 0, 0]])
    """
    sizes = arguments.tree_sizes(draft_tokens, parents)
    B, device = sizes.B, draft_tokens.device
    depth = arguments.max_depth_of(max_depth, sizes.rows)
    target_logits, target_probs, V = arguments.expect_target(
        target_logits, target_probs, row_index, sizes, device
    )
    draft_logits, draft_probs = arguments.expect_draft(
        draft_logits, draft_probs, draft_row_index, draft_vocab, sizes, V, device
    )
    allowed = arguments.expect_allowed(allowed, sizes, V, device)
    expect_choice("rule", rule, RULES)
    count = arguments.num_drafts_of(num_drafts, sizes, device)
    target = target_logits if target_logits is not None else target_probs
    assert target is not None
    if checking():
        draft = draft_logits if draft_logits is not None else draft_probs
        arguments.check_data(
            *(draft_tokens, count, V, target, row_index, draft, draft_row_index, draft_vocab),
            first=1,
        )
        arguments.check_parents(parents, count)
    args = (
        *(target_logits, draft_tokens, parents, draft_probs, draft_logits, target_probs),
        *(*count, row_index, draft_row_index, draft_vocab, allowed),
        *arguments.filters(temperature, top_k, top_p, min_p, B, device),
        *arguments.draft_temperature_of(draft_temperature, temperature, B, device),
        *(bool(filter_draft), rule, depth),
        static_number("threshold_single", threshold_single, minimum=0),
        static_number("threshold_acc", threshold_acc, minimum=0),
        *arguments.random(seed, offset, positions, uniforms, sizes, device),
        *(bool(return_logprobs), choose("rejection_sample_tree", backend, HAS, target)),
    )
    tokens, num_accepted, path, logprobs = binding.call(_op, _run, *args)
    return Verified(tokens, num_accepted, path, logprobs if return_logprobs else None)


def _run(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *args, backend = args  # type: ignore[assignment]
    if backend == "reference":
        return reference.rejection_sample_tree(*args)
    if backend == "triton":
        from .triton_kernels import rejection_sample_tree as triton

        return triton.rejection_sample_tree(*args)
    raise unavailable("rejection_sample_tree", backend, HAS)


def _fake(
    target_logits: Tensor | None,
    draft_tokens: Tensor,
    parents: Tensor,
    draft_probs: Tensor | None,
    draft_logits: Tensor | None,
    target_probs: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    target = target_logits if target_logits is not None else target_probs
    assert target is not None
    return arguments.fake_verified(draft_tokens, args[_MAX_DEPTH] + 1, target, args[-2])


_MAX_DEPTH = argument_names("rejection_sample_tree").index("max_depth") - 6  # among _fake's *args
_op = binding.bind("rejection_sample_tree", _run, _fake)
