"""Traversal verification: from the first leaf upwards.

Weng et al., "Traversal Verification for Speculative Tree Decoding" (NeurIPS 2025), algorithm 1.
Every node n keeps p'_n, q'_n and an acceptance a_n: a_root = 1, and a child c of n starts with
a_c = min(1, a_n p'_n(c) / q'_n(c)).
The first leaf in depth-first order is accepted, with all above it, with probability a. Otherwise
it is deleted, and its parent takes over what the deletion left of the target:

    R = (a_n p'_n - q'_n)+,  S = sum R,  p'_n <- R / S,  a_n <- S / (S + 1 - a_n) (1 at the root).
    S + 1 - a_n < 1e-6: a_n <- 1, p'_n stays.   Without replacement: q'_n(c) <- 0, renormalised.
"""

import torch

from .draft_tree import Nodes, Walked, at, bad_rows, total, without


def traversal(nodes: Nodes, without_replacement: bool) -> Walked:
    """Leaf first: a request descends to its first leaf, tests it, and climbs after a rejection."""
    assert nodes.q is not None
    parents, valid, u = nodes.parents, nodes.valid, nodes.u
    B, T = parents.shape
    b, i = torch.arange(B, device=u.device), torch.arange(T, device=u.device)
    p, q = nodes.p.p.clone(), nodes.q.p.clone()
    a = torch.ones_like(p[..., 0])
    left = valid & (i > 0)  # not yet deleted
    cur = torch.zeros_like(parents[:, 0])
    for _ in range(2 * T - 2):  # each node but the root is entered once, and left at most once
        # descend to the first child that is left
        first = torch.where(left & (parents == cur[:, None]), i, T).amin(-1)
        enters = first < T
        child = torch.where(enters, first, 0)
        x = at(nodes.tokens, child)
        q_x = q[b, cur, x]
        ratio = a[b, cur] * p[b, cur, x] / torch.where(q_x > 0, q_x, 1.0)
        a_child = torch.where(q_x > 0, ratio.clamp(max=1.0), 0.0)
        # or, without children, test the node; the root is what remains when all else is deleted
        accept = ~enters & ((cur == 0) | (u[b, cur] < a[b, cur]))
        reject = ~enters & ~accept
        n, x = at(parents, cur), at(nodes.tokens, cur)
        p_n, q_n, a_n = p[b, n], q[b, n], a[b, n]
        r = (a_n[:, None] * p_n - q_n).clamp(min=0)
        s = total(r)
        rest = s[:, 0] + (1 - a_n)
        sure = rest < 1e-6
        p_next = torch.where(sure[:, None], p_n, r / torch.where(s > 0, s, 1.0))
        a_next = torch.where(sure, 1.0, s[:, 0] / torch.where(sure, 1.0, rest))
        p[b, n] = torch.where(reject[:, None], p_next, p_n)
        if without_replacement:
            q[b, n] = torch.where(reject[:, None], without(q_n, x), q_n)
        a[b, n] = torch.where(reject, a_next, a_n)
        a[b, child] = torch.where(enters, a_child, a[b, child])
        left[b, cur] = left[b, cur] & ~reject
        cur = torch.where(accept, cur, torch.where(enters, child, n))  # an accepted one stays
    has_child = (valid[:, None] & (parents[:, None] == i[:, None]) & (i > 0)).any(-1)
    undecided = (valid & bad_rows(nodes.p)).any(-1)
    undecided = undecided | (valid & has_child & bad_rows(nodes.q)).any(-1)
    return Walked(cur, p[b, cur], undecided)
