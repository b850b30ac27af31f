"""Greedy verification of a drafted chain or tree: exact match and its lossy relatives.

Exact match: Stern et al., NeurIPS 2018 (blockwise parallel decoding), section 3, with its top-k and
distance criteria, section 5. Trees: SpecInfer (Miao et al., ASPLOS 2024). Typical acceptance:
Medusa (Cai et al., ICML 2024), section 2.3.1.
"""

import torch
from torch import Tensor

from . import laws, verification
from .laws import Filters
from .numbers import per_request


def verify_greedy(
    draft_tokens: Tensor,
    target: Tensor,
    parents: Tensor | None,
    num_drafts: int,
    num_drafts_tensor: Tensor | None,
    max_depth: int,
    rule: str,
    top_k: int,
    top_k_tensor: Tensor | None,
    distance: int,
    posterior_threshold: float,
    posterior_alpha: float,
    temperature: float,
    temperature_tensor: Tensor | None,
    row_index: Tensor | None,
    allowed: Tensor | None,
    first_match: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """draft_tokens [B, G | T], target rows [B, G+1 | T] -> tokens, num_accepted [B], path."""
    B, device = draft_tokens.shape[0], draft_tokens.device
    token = draft_tokens.long()
    if parents is None:  # a chain is the tree in which every node has one child
        token = torch.cat([token.new_zeros(B, 1), token], dim=-1)
    T = token.shape[1]
    node = torch.arange(T, device=device)
    parent = (node[None] - 1 if parents is None else parents.long()).expand(B, T)
    width = T if max_depth < 0 else max_depth + 1

    # nodes that exist: the root, and whatever hangs on a node of lower index
    count = per_request(num_drafts, num_drafts_tensor, B, token, torch.int64)[:, None]
    exists = (node > 0) & (parent >= 0) & (parent < node) & (node <= count)
    parent = torch.where(exists, parent, 0)

    # what a row says of its children, and its argmax
    x: Tensor | None = None
    t = per_request(temperature, temperature_tensor, B, target, torch.float64)
    if target.is_floating_point():
        rows, present, inside = laws.take_rows(target, row_index)
        if allowed is not None:
            rows = rows.masked_fill(~laws.allowed_bits(allowed, rows.shape[-1]), -torch.inf)
        top, best = rows.max(-1)  # ties: the lowest index; NaN: NaN
        good = ~top.isnan() & (top > -torch.inf)
        if rule in ("top_k", "typical"):
            x, _ = laws.usable_logits(rows)
            x = torch.where(good[..., None], x, 0.0)
        if rule == "typical":
            good = good & (t >= 0)[:, None]
        exists = exists & (token >= 0) & (token < rows.shape[-1])
    else:
        ids, present, inside = laws.take_rows(target[..., None], row_index)
        best = ids[..., 0].long()
        good = best >= 0
        exists = exists & (token >= 0)
    good = good & inside

    passes, score = _test(
        *(x, best, token, parent, rule, distance, posterior_threshold, posterior_alpha, t),
        per_request(top_k, top_k_tensor, B, token, torch.int64),
    )
    usable = (good & present).gather(1, parent)
    passes = passes & exists & usable
    if first_match:  # the lowest child of each node that passes; T: none
        first = torch.full_like(token, T)
        first.scatter_reduce_(1, parent, torch.where(passes, node, T), "amin")
        passes = passes & (node == first.gather(1, parent))

    # accepted: passed, on an accepted parent; one more level a turn
    root = (node == 0).expand(B, T)
    accepted, depth = root, torch.zeros_like(token)
    total = torch.zeros_like(score)
    for level in range(1, min(width, T)):
        below = passes & (accepted & (depth == level - 1)).gather(1, parent)
        depth = torch.where(below, level, depth)
        total = torch.where(below, total.gather(1, parent) + score, total)
        accepted = accepted | below

    # the deepest, then (typical) the likeliest, then the lowest index
    deepest = torch.where(accepted, depth, -1)
    tau = deepest.amax(-1)
    leaf = deepest == tau[:, None]
    if rule == "typical":
        top = torch.where(leaf, total, -torch.inf).amax(-1, keepdim=True)
        leaf = leaf & (total == top)
    leaf = torch.where(leaf, node, T).amin(-1)

    # bad rows that were read: those of accepted nodes with a child to test, and the last one
    children = torch.zeros_like(token).scatter_add_(1, parent, exists.long()) > 0
    read = (accepted & children & (depth < width - 1)) | (node == leaf[:, None])
    decided = ~(read & present & ~good).any(-1)

    # the path, from the leaf up
    path = torch.full((B, width), -1, dtype=torch.int64, device=device)
    step = torch.arange(width, device=device)
    at = leaf[:, None]
    for _ in range(min(width, T)):
        path = torch.where(step == depth.gather(1, at), at, path)
        at = parent.gather(1, at)
    last = torch.where(present, best, -1).gather(1, leaf[:, None])
    following = torch.cat([path[:, 1:], path.new_full((B, 1), -1)], dim=-1)
    tokens = torch.where(step == tau[:, None], last, token.gather(1, following.clamp(min=0)))
    keep = decided[:, None] & (step <= tau[:, None])
    return (
        torch.where(keep, tokens, -1),
        torch.where(decided, tau, 0).int(),
        torch.where(keep, path, -1).int(),
    )


def _test(
    x: Tensor | None,
    best: Tensor,
    token: Tensor,
    parent: Tensor,
    rule: str,
    distance: int,
    posterior_threshold: float,
    posterior_alpha: float,
    t: Tensor,
    top_k: Tensor,
) -> tuple[Tensor, Tensor]:
    """Which nodes pass the test of their parent's row, bool [B, T], and log p (typical only)."""
    parent_best = best.gather(1, parent)
    none = torch.zeros(token.shape, device=token.device)
    exact = token == parent_best
    if rule == "exact":
        return exact, none
    if rule == "distance":
        return (token - parent_best).abs() <= distance, none
    assert x is not None
    V = x.shape[-1]
    column = parent * V + token.clamp(0, V - 1)  # of the flattened rows [B, T * V]
    if rule == "top_k":  # by value: ties with the k-th largest pass as well
        k = top_k.clamp(1, V)[:, None, None].expand(*x.shape[:2], 1)
        kth = x.sort(-1, descending=True).values.gather(-1, k - 1)[..., 0]
        value = x.flatten(1).gather(1, column)
        return (value >= kth.gather(1, parent)) & (value > -torch.inf), none
    # typical: p(x) > min(epsilon, delta exp(-H)), H = -sum p log(p + 1e-5)
    p, _ = laws.logits_law(x, Filters(t, None, None, None))
    H = -verification.row_sum(p * (p + 1e-5).log())
    threshold = (posterior_alpha * (-H).exp()).clamp(max=posterior_threshold)
    p_token = p.flatten(1).gather(1, column)
    typical = p_token > threshold.gather(1, parent)
    return torch.where(t[:, None] == 0, exact, typical), p_token.log()
