"""Verification of a draft tree by rejection sampling, by one of six rules.

recursive, without_replacement   SpecInfer (Miao et al., ASPLOS 2024, algorithm 2), Sequoia (Chen et
                                 al., 2024): siblings i.i.d. from q, or drawn without replacement
k_seq                            SpecTr (Sun et al., NeurIPS 2023, algorithm 2)
traversal, .._without_replacement  Weng et al., NeurIPS 2025: leaf first, see ``traversal.py``
target_only                      the target's law alone, one coin for the children of a node
Without a draft law (deterministic drafts) every rule but target_only tests delta proposals.
"""

import torch
from torch import Tensor

from .. import philox
from . import laws, verification
from .draft_tree import (
    Nodes,
    Walked,
    at,
    bad_rows,
    make_nodes,
    path_to,
    residual,
    total,
    without,
)
from .numbers import per_request
from .traversal import traversal


def rejection_sample_tree(
    target_logits: Tensor | None,
    draft_tokens: Tensor,
    parents: Tensor,
    draft_probs: Tensor | None,
    draft_logits: Tensor | None,
    target_probs: Tensor | None,
    num_drafts: int,
    num_drafts_tensor: Tensor | None,
    row_index: Tensor | None,
    draft_row_index: Tensor | None,
    draft_vocab: Tensor | None,
    allowed: Tensor | None,
    temperature: float,
    temperature_tensor: Tensor | None,
    top_k: int,
    top_k_tensor: Tensor | None,
    top_p: float,
    top_p_tensor: Tensor | None,
    min_p: float,
    min_p_tensor: Tensor | None,
    draft_temperature: float,
    draft_temperature_tensor: Tensor | None,
    filter_draft: bool,
    rule: str,
    max_depth: int,
    threshold_single: float,
    threshold_acc: float,
    seed: int,
    seed_tensor: Tensor | None,
    offset: int,
    offset_tensor: Tensor | None,
    positions: int,
    positions_tensor: Tensor | None,
    uniforms: Tensor | None,
    return_logprobs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tokens [B, max_depth+1], num_accepted [B], path [B, max_depth+1], logprobs or size 0."""
    B, T = draft_tokens.shape
    target = target_logits if target_logits is not None else target_probs
    assert target is not None
    V = target.shape[-1]

    # the laws: p after each node, q for each node's children
    f = laws.filters(
        *(temperature, temperature_tensor, top_k, top_k_tensor),
        *(top_p, top_p_tensor, min_p, min_p_tensor),
        batch=B,
        like=target,
    )
    p = laws.law(target_logits, target_probs, row_index, f, allowed)
    q = None
    if (draft_logits is not None or draft_probs is not None) and rule != "target_only":
        t = per_request(draft_temperature, draft_temperature_tensor, B, target, p.p.dtype)
        q = verification.draft_law(
            *(draft_logits, draft_probs, draft_row_index, draft_vocab, f, t, filter_draft, V)
        )
        q = q._replace(p=q.p.to(p.p.dtype))

    # the tree and its coins, node i's with index i, the last token's with -1; greedy draws nothing
    if uniforms is not None:
        uniforms = verification.usable_uniforms(uniforms)
    else:
        i = torch.arange(T, device=target.device)
        keys = philox.request_keys(seed, seed_tensor, B, target.device)[:, None]
        offsets = per_request(offset, offset_tensor, B, target, torch.int64)[:, None]
        position = per_request(positions, positions_tensor, B, target, torch.int64)[:, None]
        accepting = philox.uniform(philox.ACCEPT, keys, offsets, position, i)
        resampling = philox.uniform(philox.RESAMPLE, keys, offsets, position, i[:1] - 1)
        uniforms = torch.cat([accepting, resampling], 1)
    greedy = f.temperature == 0
    u = torch.where(greedy[:, None], 0.0, uniforms)
    count = per_request(num_drafts, num_drafts_tensor, B, target, torch.int64)
    nodes = make_nodes(draft_tokens, parents, count, max_depth, p, q, greedy, u)

    # the walk
    if rule.startswith("traversal") and q is not None:
        leaf_first = traversal(nodes, rule == "traversal_without_replacement")
        walked = _where(greedy, multi_round(nodes._replace(q=None), False), leaf_first)
    elif rule == "target_only":
        walked = target_only(nodes, threshold_single, threshold_acc)
    elif rule == "k_seq" and q is not None:
        walked = k_seq(nodes)
    else:
        walked = multi_round(nodes, rule == "without_replacement")

    # what is emitted: the accepted path, then a token of the last node's law
    width = max_depth + 1
    path = path_to(nodes, walked.last, width)
    num_accepted = at(nodes.depth, walked.last)
    last_token = torch.where(at(p.present, walked.last), laws.draw(walked.weights, u[:, T]), -1)
    j = torch.arange(width, device=target.device)
    accepted = nodes.tokens.gather(1, path.roll(-1, 1).clamp(min=0))
    tokens = torch.where(j < num_accepted[:, None], accepted, -1)
    tokens = torch.where(j == num_accepted[:, None], last_token[:, None], tokens)
    undecided = walked.undecided[:, None]
    tokens, path = torch.where(undecided, -1, tokens), torch.where(undecided, -1, path)
    logprobs = p.p.new_empty(0)
    if return_logprobs:
        rows = verification.unfiltered_logprobs(
            target_logits, target_probs, row_index, allowed, f.temperature
        )
        emitted = rows.flatten(1).gather(1, path.clamp(min=0) * V + tokens.clamp(min=0))
        logprobs = torch.where(tokens >= 0, emitted, 0.0)
    num_accepted = torch.where(undecided[:, 0], 0, num_accepted)
    return tokens, num_accepted.int(), path.int(), logprobs


# ---- the rules ----------------------------------------------------------------------------------
#
# One pass over the nodes is the walk from the root: parents precede children and siblings are
# tested in index order, so when node i comes up, the walk stands at its parent or never will.


def multi_round(nodes: Nodes, without_replacement: bool) -> Walked:
    """p' <- p, q' <- q; accept child x if u q'(x) < p'(x), else p' <- norm((p' - q')+), and without
    replacement q'(x) <- 0, renormalised (all 0 when q' is exhausted: then nothing is accepted, and
    p' stays). Deterministic and greedy drafts: q' is x's delta.
    """
    T = nodes.tokens.shape[1]
    delta = torch.ones_like(nodes.greedy) if nodes.q is None else nodes.greedy
    cur, undecided = _start(nodes)
    p = nodes.p.p[:, 0]
    q = torch.zeros_like(p) if nodes.q is None else nodes.q.p[:, 0]
    for i in range(1, T):
        x = nodes.tokens[:, i]
        q_i = torch.where(delta[:, None], torch.zeros_like(q).scatter(1, x[:, None], 1.0), q)
        tested, undecided = _test(nodes, cur, i, undecided)
        q_x, p_x = q_i.gather(1, x[:, None])[:, 0], p.gather(1, x[:, None])[:, 0]
        accept = tested & (q_x > 0) & (nodes.u[:, i] * q_x < p_x)
        reject = (tested & ~accept)[:, None]
        p = torch.where(reject, residual(p, q_i), p)
        if without_replacement:
            q = torch.where(reject, without(q, x), q)
        cur, undecided = _accept(nodes, accept, cur, i, undecided)
        p = torch.where(accept[:, None], nodes.p.p[:, i], p)
        if nodes.q is not None:
            q = torch.where(accept[:, None], nodes.q.p[:, i], q)
    return Walked(cur, p, undecided)


def k_seq(nodes: Nodes) -> Walked:
    """Accept child x if u rho q(x) < p(x), the same p, q, rho for all k children of a node; all
    rejected: p - min(q, p / rho) (1 - (1 - beta)^k) / beta, with beta = sum min(q, p / rho).
    """
    assert nodes.q is not None
    p, q = nodes.p.p, nodes.q.p
    T = nodes.tokens.shape[1]
    i = torch.arange(T, device=p.device)
    is_child = (nodes.parents[:, None] == i[:, None]) & (i > 0) & nodes.valid[:, None]
    k = is_child.sum(-1, keepdim=True).to(p.dtype)  # [B, T, 1]
    rho = k_seq_rho(p, q, k)
    cur, undecided = _start(nodes)
    for n in range(1, T):
        x = nodes.tokens[:, n, None]
        tested, undecided = _test(nodes, cur, n, undecided)
        p_x, q_x = at(p, cur).gather(1, x)[:, 0], at(q, cur).gather(1, x)[:, 0]
        passes = (q_x > 0) & (nodes.u[:, n] * at(rho, cur)[:, 0] * q_x < p_x)
        accept = tested & torch.where(nodes.greedy, p_x > 0, passes)
        cur, undecided = _accept(nodes, accept, cur, n, undecided)
    p, q, k, rho = at(p, cur), at(q, cur), at(k, cur), at(rho, cur)
    common = torch.minimum(q, p / rho)
    rest = (p - common * k_seq_taken(total(common), k)).clamp(min=0)
    keeps_p = nodes.greedy[:, None] | (total(rest) == 0)
    return Walked(cur, torch.where(keeps_p, p, rest), undecided)


def k_seq_rho(p: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The smallest rho in [1, k] with 1 - (1 - beta)^k <= rho beta, by 24 halvings."""

    def too_small(rho: Tensor) -> Tensor:
        return k_seq_taken(total(torch.minimum(q, p / rho)), k) > rho

    low = torch.ones_like(k)
    high = torch.where(too_small(low), k.clamp(min=1), low)
    for _ in range(24):
        middle = (low + high) / 2
        above = too_small(middle)
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return high


def k_seq_taken(beta: Tensor, k: Tensor) -> Tensor:
    """(1 - (1 - beta)^k) / beta without cancellation; exactly k for k <= 1, as in multi_round."""
    several = -torch.expm1(k * torch.log1p(-beta.clamp(max=1.0))) / beta  # k = 0, beta = 1: NaN
    return torch.where((k > 1) & (beta > 0), several, k)


def target_only(nodes: Nodes, threshold_single: float, threshold_acc: float) -> Walked:
    """One u a node: s <- s + p(x) (a token already tried adds 0); accept the first child x with
    u sum(p) max(threshold_acc, 1e-9) < s or p(x) >= threshold_single sum(p); else p less the tried.
    """
    T = nodes.tokens.shape[1]
    cur, undecided = _start(nodes)
    p = nodes.p.p[:, 0]
    single = torch.full_like(p[:, 0], threshold_single).masked_fill(nodes.greedy, 1.0)
    left = p  # p less the tokens already tried
    s = torch.zeros_like(p[:, 0])
    for i in range(1, T):
        x = nodes.tokens[:, i, None]
        tested, undecided = _test(nodes, cur, i, undecided)
        s = torch.where(tested, s + left.gather(1, x)[:, 0], s)
        left = torch.where(tested[:, None], left.scatter(1, x, 0.0), left)
        mass, p_x = total(p)[:, 0], p.gather(1, x)[:, 0]
        passes = at(nodes.u, cur) * mass * max(threshold_acc, 1e-9) < s
        accept = tested & (passes | (p_x >= single * mass))
        cur, undecided = _accept(nodes, accept, cur, i, undecided)
        s = torch.where(accept, 0.0, s)
        p = torch.where(accept[:, None], nodes.p.p[:, i], p)
        left = torch.where(accept[:, None], p, left)
    return Walked(cur, torch.where(total(left) > 0, left, p), undecided)


def _start(nodes: Nodes) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(nodes.parents[:, 0]), bad_rows(nodes.p)[:, 0]


def _test(nodes: Nodes, cur: Tensor, i: int, undecided: Tensor) -> tuple[Tensor, Tensor]:
    """Whether node i is a child of the node where the walk stands; the draft row is read if so."""
    tested = nodes.valid[:, i] & (nodes.parents[:, i] == cur)
    if nodes.q is not None:
        undecided = undecided | (tested & ~nodes.greedy & at(bad_rows(nodes.q), cur))
    return tested, undecided


def _accept(
    nodes: Nodes, accept: Tensor, cur: Tensor, i: int, undecided: Tensor
) -> tuple[Tensor, Tensor]:
    """The walk moves on to node i, and reads its target row."""
    undecided = undecided | (accept & bad_rows(nodes.p)[:, i])
    return torch.where(accept, i, cur), undecided


def _where(condition: Tensor, x: Walked, y: Walked) -> Walked:
    return Walked(
        torch.where(condition, x.last, y.last),
        torch.where(condition[:, None], x.weights, y.weights),
        torch.where(condition, x.undecided, y.undecided),
    )
