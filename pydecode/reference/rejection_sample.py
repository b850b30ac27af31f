"""Verification of a drafted chain by rejection sampling: the output's law is the target's.

Token rule: Leviathan et al., ICML 2023, algorithm 1; Chen et al., 2023. Draft x_i ~ q_i is accepted
while u_i q_i(x_i) < p_i(x_i); the first rejected one is replaced by y ~ norm(relu(p_i - q_i)).
Block rule: Sun et al., ICLR 2025, algorithm 2; see ``_block``.
"""

import torch
from torch import Tensor

from .. import philox
from . import laws, verification
from .laws import Rows
from .numbers import per_request


def rejection_sample(
    target_logits: Tensor | None,
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    draft_probs: Tensor | None,
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
    seed: int,
    seed_tensor: Tensor | None,
    offset: int,
    offset_tensor: Tensor | None,
    positions: int,
    positions_tensor: Tensor | None,
    uniforms: Tensor | None,
    return_logprobs: bool,
    return_num_passed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """draft_tokens [B, G] -> tokens [B, G+1], num_accepted [B], path [B, G+1], logprobs,
    num_passed [B]."""
    B, G = draft_tokens.shape
    target = target_logits if target_logits is not None else target_probs
    assert target is not None
    V, device = target.shape[-1], target.device
    f = laws.filters(
        *(temperature, temperature_tensor, top_k, top_k_tensor),
        *(top_p, top_p_tensor, min_p, min_p_tensor),
        batch=B,
        like=target,
    )
    greedy = f.temperature == 0

    # the laws: p [B, G+1, V] and q [B, G, V]; a delta proposal has q = 1 at its draft
    p = laws.law(target_logits, target_probs, row_index, f, allowed)
    x = draft_tokens.long()
    in_vocab = (x >= 0) & (x < V)
    x = torch.where(in_vocab, x, 0)
    delta = torch.zeros(B, G, V, dtype=p.p.dtype, device=device).scatter_(-1, x[..., None], 1.0)
    sampled = draft_logits is not None or draft_probs is not None
    if sampled:
        t = per_request(draft_temperature, draft_temperature_tensor, B, target, f.temperature.dtype)
        q = verification.draft_law(
            *(draft_logits, draft_probs, draft_row_index, draft_vocab, f, t, filter_draft, V)
        )
        not_read = greedy[:, None]
        law_q = torch.where(not_read[..., None], delta, q.p)
        q = Rows(law_q, q.good | not_read, q.present | not_read)
    else:
        q = Rows(delta, torch.ones_like(in_vocab), torch.ones_like(in_vocab))

    # the chain's length n: it ends before a draft that is not there or cannot be tested
    i = torch.arange(G + 1, device=device)
    count = per_request(num_drafts, num_drafts_tensor, B, target, torch.int64)[:, None]
    testable = (i[:G] < count) & in_vocab & p.present[:, :G] & q.present
    n = testable.long().cumprod(-1).sum(-1)
    inside = i[:G] < n[:, None]

    # the draws: none for a greedy request, which 0 stands for
    if uniforms is not None:
        u = verification.usable_uniforms(uniforms)
    else:
        key = philox.request_keys(seed, seed_tensor, B, device)[:, None]
        at = per_request(offset, offset_tensor, B, target, torch.int64)[:, None]
        position = per_request(positions, positions_tensor, B, target, torch.int64)[:, None]
        u = torch.cat(
            [
                philox.uniform(philox.ACCEPT, key, at, position, i[:G]),
                philox.uniform(philox.RESAMPLE, key, at, position, i.new_full((1,), -1)),
            ],
            dim=-1,
        )
    u = torch.where(greedy[:, None], 0.0, u)

    # the rule: tau accepted drafts, and pi, by which the residual scales p
    p_x = p.p[:, :G].gather(-1, x[..., None])[..., 0]
    q_x = q.p.gather(-1, x[..., None])[..., 0]
    accept = inside & (q_x > 0) & (u[:, :G] * q_x < p_x)
    tau = accept.long().cumprod(-1).sum(-1)
    last_read, pi = tau, p_x.new_ones(B, G + 1)
    if rule == "block" and sampled:
        tau_block, pi_block = _block(p.p[:, :G], q.p, p_x, q_x, u[:, :G], n)
        tau = torch.where(greedy, tau, tau_block)
        pi = torch.where(greedy[:, None], pi, pi_block)
        last_read = torch.where(greedy, tau, n)

    # a bad row among those that were read leaves the request undecided
    bad = p.present & ~p.good & (i <= last_read[:, None])
    bad_draft = inside & ~q.good & (i[:G] <= last_read[:, None])
    decided = ~(bad.any(-1) | bad_draft.any(-1))

    # the last token: y ~ norm(relu(pi p - q)), and p itself at the chain's end
    p_tau = _row(p.p, tau)
    w = _row(pi[..., None], tau) * p_tau
    if G:
        w = (w - _row(q.p, tau.clamp(max=G - 1))).relu()
    no_residual = (tau == n) | ~(w > 0).any(-1)
    y = laws.draw(torch.where(no_residual[:, None], p_tau, w), u[:, G])
    y = torch.where(_row(p.present[..., None], tau)[:, 0], y, -1)

    emitted = torch.cat([x, y[:, None]], dim=-1).scatter(-1, tau[:, None], y[:, None])
    keep = decided[:, None] & (i <= tau[:, None])
    tokens = torch.where(keep, emitted, -1)
    path = torch.where(keep, i, -1).int()
    num_accepted = torch.where(decided, tau, 0).int()
    logprobs = p.p.new_empty(0)
    if return_logprobs:
        logp = verification.unfiltered_logprobs(
            target_logits, target_probs, row_index, allowed, f.temperature
        ).gather(-1, tokens.clamp(min=0)[..., None])
        logprobs = torch.where(tokens >= 0, logp[..., 0], 0.0)
    num_passed = num_accepted.new_empty(0)
    if return_num_passed:  # each draft by its own draw, whatever became of those before it
        num_passed = torch.where(decided, accept.sum(-1), 0).int()
    return tokens, num_accepted, path, logprobs, num_passed


def _block(
    p: Tensor, q: Tensor, p_x: Tensor, q_x: Tensor, u: Tensor, n: Tensor
) -> tuple[Tensor, Tensor]:
    """Block verification: tau [B] and pi_0..pi_G [B, G+1] of laws [B, G, V] at drafts [B, G].

    pi_i = min(1, pi_{i-1} p(x_i) / q(x_i)), pi_0 = 1; S_i = sum_x relu(pi_i p_i(x) - q_i(x));
    h_i = S_i / (S_i + 1 - pi_i) for i < n, h_n = pi_n; tau is the last i with u_i < h_i, else 0.
    """
    B, G = q_x.shape
    pi = [p.new_ones(B)]
    for p_i, q_i in zip(p_x.unbind(-1), q_x.unbind(-1)):
        weight = pi[-1] * p_i  # compared before it is divided, so that nothing overflows
        ratio = torch.where(weight < q_i, weight / q_i, 1.0)
        pi.append(torch.where(q_i > 0, ratio, 0.0))
    scale = torch.stack(pi, dim=-1)
    S = verification.row_sum((scale[:, :G, None] * p - q).relu())
    denominator = S + (1 - scale[:, :G])
    h = torch.where(denominator < 1e-6, 1.0, S / denominator)
    i = torch.arange(1, G + 1, device=p.device)  # h_1..h_G
    h = torch.cat([h[:, 1:], torch.zeros_like(h[:, :1])], dim=-1)
    h = torch.where(i == n[:, None], scale[:, 1:], h)
    passed = (i <= n[:, None]) & (u < h)
    tau = torch.where(passed, i, 0).cummax(-1).values[:, -1] if G else n
    return tau, scale


def _row(x: Tensor, index: Tensor) -> Tensor:
    """Row index[b] of x [B, R, V], [B, V]."""
    return x.gather(1, index[:, None, None].expand(-1, 1, x.shape[-1]))[:, 0]
