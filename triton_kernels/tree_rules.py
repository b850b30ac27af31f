"""The rules at one node of a walk: (accepted child or BLOCK_T, last token or -1[, decided])."""

import triton
import triton.language as tl

from .tree_residuals import draw_left, laws_at, record, residual, sibling_of
from .tree_rows import (
    draw_plain,
    drawn_chunk,
    following,
    node_coin,
    proposal_at,
    proposal_chunk,
    read_row,
    target_at,
    target_chunk,
    token_of,
)
from .vocabulary import drawn


@triton.jit
def test_in_turn(
    p, q, P, q_numbers, tree, b, T, cur, i, kids, masses, coins, last_u,
    WITHOUT: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """recursive, without_replacement: accept x if u q'(x) < p'(x), else p' <- norm((p' - q')+)."""
    chosen, token = tl.full([], BLOCK_T, tl.int32), tl.full([], -1, tl.int32)
    decided = last_u >= 0
    head = following(kids, i, 0, BLOCK_T)
    if head == BLOCK_T:
        token = draw_plain(p, P, masses, last_u, CHUNK, BLOCK_C)
    else:
        Q, _masses, _best, _present, decided = read_row(q, q_numbers, b, cur, CHUNK, BLOCK_C)
        masses = masses / P.mass
        child, count = head, tl.zeros([], tl.int32)
        going = decided
        while going:
            u = node_coin(coins, b, child)
            x = token_of(tree, b, child)
            p_x, q_x = laws_at(p, q, P, Q, tree, b, T, head, count, x, WITHOUT, CHUNK)
            if (q_x > 0) & (u * q_x < p_x):
                chosen = child
                going = child < 0
            else:
                left, spent = residual(
                    p, q, P, Q, tree, b, T, head, count, 1.0, x, WITHOUT, CHUNK, BLOCK_C
                )
                S = tl.sum(left, 0)
                masses = tl.where(S > 0, left / S, masses)
                sibling = following(kids, i, child, BLOCK_T)
                spent = tl.where(spent > 0, spent, float("inf"))  # nothing is left: q' is 0
                record(tree, b, T, child, 1.0, tl.where(S > 0, S, -1.0), spent, sibling)
                count += 1
                child = sibling
                going = sibling < BLOCK_T
                if WITHOUT:
                    going = going & (spent < float("inf"))
        if decided & (chosen == BLOCK_T):
            token = draw_left(
                p, q, P, Q, tree, b, T, head, count, masses, last_u, WITHOUT, CHUNK, BLOCK_C
            )
    return chosen, token, decided


@triton.jit
def untried_chunk(p, P, tree, b, T, last, count, kept, start, CHUNK: tl.constexpr):
    """e(v) of a chunk of the target's law, 0 at the tokens already tried but for ``kept``: the
    last such child leads to the others."""
    v = start + tl.arange(0, CHUNK)
    e = target_chunk(p, P, start, CHUNK)
    child = last
    for _ in range(count):
        x = token_of(tree, b, child)
        e = tl.where((v == x) & (v != kept), 0.0, e)
        child = sibling_of(tree, b, T, child)  # the one before it
    return e


@triton.jit
def less_tried(
    p, P, tree, b, T, last, count, kept, x, masses, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The masses once x, the last tried, is gone: its chunk is summed anew, so that no rounding
    error of a difference takes the place of a small rest."""
    e = untried_chunk(p, P, tree, b, T, last, count, kept, x // CHUNK * CHUNK, CHUNK)
    return tl.where(tl.arange(0, BLOCK_C) == x // CHUNK, tl.sum(e, 0), masses)


@triton.jit
def draw_untried(
    p, P, tree, b, T, last, count, kept, masses, u, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr
):
    c, before, target = drawn_chunk(masses, u, p.C, BLOCK_C)
    e = untried_chunk(p, P, tree, b, T, last, count, kept, c * CHUNK, CHUNK)
    return drawn(e, before, target, c * CHUNK, CHUNK)


@triton.jit
def test_alone(
    p, P, tree, b, T, i, kids, tokens, masses, coins, last_u,
    CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Deterministic drafts: accept x if u < p'(x), else p'(x) <- 0, renormalised, unless nothing
    else is left."""
    chosen, token = tl.full([], BLOCK_T, tl.int32), tl.full([], -1, tl.int32)
    kept, count = tl.full([], -1, tl.int32), tl.zeros([], tl.int32)
    last = tl.zeros([], tl.int32)
    child = following(kids, i, 0, BLOCK_T)
    while child < BLOCK_T:
        x = token_of(tree, b, child)
        sibling = following(kids, i, child, BLOCK_T)
        again = tl.max(tl.where((kids > 0) & (i < child) & (tokens == x), 1, 0), 0)
        e = target_at(p, P, x)
        e = tl.where((again == 1) & (x != kept), 0.0, e)
        if node_coin(coins, b, child) * tl.sum(masses, 0) < e:
            chosen = child
            sibling = child * 0 + BLOCK_T
        elif (e > 0) & (x != kept):
            record(tree, b, T, child, 0.0, 0.0, 0.0, last)
            last, count = child, count + 1
            left = less_tried(p, P, tree, b, T, last, count, -1, x, masses, CHUNK, BLOCK_C)
            alone = tl.sum(left, 0) == 0
            masses = tl.where(alone, masses, left)
            kept = tl.where(alone, x, kept)
        child = sibling
    if chosen == BLOCK_T:
        token = draw_untried(
            p, P, tree, b, T, last, count, kept, masses, last_u, CHUNK, BLOCK_C
        )  # fmt: skip
    return chosen, token


@triton.jit
def test_together(
    p, P, tree, b, T, i, kids, tokens, masses, u, last_u, threshold_single, threshold_acc,
    CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """target_only: one coin; s sums p over the children, and the first that it covers is taken."""
    chosen, token = tl.full([], BLOCK_T, tl.int32), tl.full([], -1, tl.int32)
    count, s = tl.zeros([], tl.int32), tl.zeros([], tl.float32)
    bound = u * P.mass * tl.maximum(threshold_acc, 1e-9)
    left = masses
    last = tl.zeros([], tl.int32)
    child = following(kids, i, 0, BLOCK_T)
    while child < BLOCK_T:
        x = token_of(tree, b, child)
        sibling = following(kids, i, child, BLOCK_T)
        again = tl.max(tl.where((kids > 0) & (i < child) & (tokens == x), 1, 0), 0)
        e = target_at(p, P, x)
        fresh = tl.where(again == 1, 0.0, e)
        s += fresh
        if (bound < s) | (e >= threshold_single * P.mass):
            chosen = child
            sibling = child * 0 + BLOCK_T
        elif fresh > 0:
            record(tree, b, T, child, 0.0, 0.0, 0.0, last)
            last, count = child, count + 1
            left = less_tried(p, P, tree, b, T, last, count, -1, x, left, CHUNK, BLOCK_C)
        child = sibling
    if chosen == BLOCK_T:
        nothing = tl.sum(left, 0) == 0  # then p itself
        left = tl.where(nothing, masses, left)
        count = tl.where(nothing, 0, count)
        token = draw_untried(
            p, P, tree, b, T, last, count, -1, left, last_u, CHUNK, BLOCK_C
        )  # fmt: skip
    return chosen, token


@triton.jit
def test_k(
    p, q, P, q_numbers, tree, b, cur, i, kids, masses, coins, last_u,
    CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, HALVINGS: tl.constexpr,
):  # fmt: skip
    """k_seq: accept x if u rho q(x) < p(x), for all k children; else p less what they cover."""
    chosen, token = tl.full([], BLOCK_T, tl.int32), tl.full([], -1, tl.int32)
    decided = last_u >= 0
    child = following(kids, i, 0, BLOCK_T)
    if child == BLOCK_T:
        token = draw_plain(p, P, masses, last_u, CHUNK, BLOCK_C)
    else:
        Q, _masses, _best, _present, decided = read_row(q, q_numbers, b, cur, CHUNK, BLOCK_C)
        if decided:
            k = tl.sum(kids, 0)
            rho = smallest_rho(p, q, P, Q, k, CHUNK, HALVINGS)
            while child < BLOCK_T:
                u = node_coin(coins, b, child)
                x = token_of(tree, b, child)
                p_x = target_at(p, P, x) / P.mass
                q_x = proposal_at(q, Q, x, CHUNK)
                accepted = (q_x > 0) & (u * rho * q_x < p_x)
                chosen = tl.where(accepted, child, BLOCK_T)
                child = tl.where(accepted, BLOCK_T, following(kids, i, child, BLOCK_T))
            if chosen == BLOCK_T:
                token = draw_uncovered(p, q, P, Q, k, rho, masses, last_u, CHUNK, BLOCK_C)
    return chosen, token, decided


@triton.jit
def taken(beta, k):
    """(1 - (1 - beta)^k) / beta = 1 + r + ... + r^(k-1), r = 1 - beta, without cancellation."""
    r = 1.0 - tl.minimum(beta, 1.0)
    total, power = r * 0.0, r * 0.0 + 1.0  # of no term, and r^0
    for n in range(11):
        total = total * (1.0 + power)
        power = power * power
        odd = (k >> (10 - n)) & 1 == 1
        total = tl.where(odd, 1.0 + r * total, total)
        power = tl.where(odd, r * power, power)
    return total


@triton.jit
def uncovered(b_p, b_q, rho, share):
    """(p - min(q, p / rho) share)+"""
    return tl.maximum(b_p - tl.minimum(b_q, b_p / rho) * share, 0.0)


@triton.jit
def common_masses(p, q, P, Q, rhos, CHUNK: tl.constexpr, POINTS: tl.constexpr):
    """beta = sum min(q, p / rho) of each rho, [POINTS], in one pass."""
    # half a chunk at once, for registers; a reduced vocabulary is laid out by whole ones
    TILE: tl.constexpr = CHUNK // 2 if q.vocab is None else CHUNK
    total = tl.zeros([POINTS], tl.float32)
    for start in range(0, p.V, TILE):
        b_p = target_chunk(p, P, start, TILE) / P.mass
        b_q = proposal_chunk(q, Q, start, TILE)
        total += tl.sum(tl.minimum(b_q[:, None], b_p[:, None] / rhos[None, :]), 0)
    return total


@triton.jit
def smallest_rho(p, q, P, Q, k, CHUNK: tl.constexpr, HALVINGS: tl.constexpr):
    """The smallest rho in [1, k] with 1 - (1 - beta)^k <= rho beta, by 24 halvings, some in a pass:
    it tries all points where they may lead. Point o is where the bits of o do, 1 to the right."""
    POINTS: tl.constexpr = 2**HALVINGS
    TURNS: tl.constexpr = 24 // HALVINGS
    o = tl.arange(0, POINTS)
    low, high = tl.full([], 1.0, tl.float32), k.to(tl.float32)
    turn = tl.where(k > 1, 0, TURNS)
    while turn < TURNS:
        left, right = tl.zeros([POINTS], tl.float32) + low, tl.zeros([POINTS], tl.float32) + high
        for n in tl.static_range(HALVINGS):
            middle = (left + right) / 2
            to_right = (o >> (HALVINGS - 1 - n)) & 1 == 1
            left, right = tl.where(to_right, middle, left), tl.where(to_right, right, middle)
        masses = common_masses(p, q, P, Q, left, CHUNK, POINTS)
        above = tl.where(taken(masses, k) > left, 1, 0)
        if (turn == 0) & (tl.max(tl.where(o == 0, above, 0), 0) == 0):
            high, turn = low, turn + TURNS  # 1 is enough
        else:
            at = turn * 0
            for n in tl.static_range(HALVINGS):
                step = POINTS >> (n + 1)
                at += step * tl.max(tl.where(o == at + step, above, 0), 0)
            low = tl.sum(tl.where(o == at, left, 0.0), 0)
            high = tl.sum(tl.where(o == at, right, 0.0), 0)
            turn += 1
    return high


@triton.jit
def draw_uncovered(p, q, P, Q, k, rho, masses, u, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr):
    """A token of what the k children do not cover of p; of p if that is nothing."""
    one = tl.zeros([1], tl.float32) + rho
    share = tl.sum(taken(common_masses(p, q, P, Q, one, CHUNK, 1), k), 0)
    o_c = tl.arange(0, BLOCK_C)
    left = tl.zeros([BLOCK_C], tl.float32)
    for c in range(p.C):
        b_p = target_chunk(p, P, c * CHUNK, CHUNK) / P.mass
        b_q = proposal_chunk(q, Q, c * CHUNK, CHUNK)
        left = tl.where(o_c == c, tl.sum(uncovered(b_p, b_q, rho, share), 0), left)
    token = tl.full([], -1, tl.int32)
    if tl.sum(left, 0) > 0:
        c, before, target = drawn_chunk(left, u, p.C, BLOCK_C)
        b_p = target_chunk(p, P, c * CHUNK, CHUNK) / P.mass
        b_q = proposal_chunk(q, Q, c * CHUNK, CHUNK)
        token = drawn(uncovered(b_p, b_q, rho, share), before, target, c * CHUNK, CHUNK)
    else:
        token = draw_plain(p, P, masses, u, CHUNK, BLOCK_C)
    return token
