"""Traversal verification, leaf first: a program takes one request.

Every row of a node that exists counts, so ``law_prepare`` reads them all, and ``leaf_first`` begins
by making each row's few numbers of its chunks'. It tests the first leaf, climbs after a rejection,
and stops at the first acceptance; a rejected leaf costs one pass over its parent's two rows.
"""

import triton
import triton.language as tl

from .law_rows import least_of, place, row_bits, temperature_of
from .law_vectors import place_rows, read_floors, read_laws
from .tree_residuals import draw_left, laws_at, laws_chunk, record, residual
from .tree_rows import (
    Coins,
    Row,
    draw_whole,
    following,
    id_of,
    last_coin,
    last_node,
    log_of,
    node_coin,
    read_nodes,
    token_of,
)
from .tree_walk import finish
from .vocabulary import NO_TOKEN, scale_of

NUMBERS = tl.constexpr(6)  # of a row: top, Z, floor, mass, then int32: argmax, and what it is
GOOD, BAD, ABSENT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
AT_ONCE = tl.constexpr(2048)  # chunks whose numbers are read at once


@triton.jit
def leave_numbers(law, numbers, b, last, rows, BLOCK_C: tl.constexpr):
    """rows [T, NUMBERS] of a request's nodes up to ``last``, of the chunks of all their rows."""
    temperature = temperature_of(numbers, b)
    scale = scale_of(temperature)
    for start in range(0, last + 1, AT_ONCE // BLOCK_C):
        i = start + tl.arange(0, AT_ONCE // BLOCK_C)
        at, _row, present, inside = place_rows(law, b, i)
        exists = i <= last
        top, Z, best, good = read_laws(law, at, inside & exists, scale, BLOCK_C)
        floor, mass = read_floors(law, at, good, Z)
        heat = i * 0 + temperature
        kind = tl.where(good & (heat >= 0), GOOD, tl.where(present, BAD, ABSENT))
        to = rows + i * NUMBERS
        tl.store(to, top, mask=exists)
        tl.store(to + 1, Z, mask=exists)
        tl.store(to + 2, floor, mask=exists)
        tl.store(to + 3, tl.where(heat == 0, 1.0, mass), mask=exists)
        tl.store(whole(to, 4), best, mask=exists)
        tl.store(whole(to, 5), kind, mask=exists)


@triton.jit
def whole(rows, field):
    """Pointer to an int32 among the rows' numbers."""
    return (rows + field).to(tl.pointer_type(tl.int32))


@triton.jit
def row_at(law, numbers, rows, b, i):
    """A good row, from its numbers."""
    _at, x, _present, _inside = place(law, b, i)
    temperature = temperature_of(numbers, b)
    at = rows + i * NUMBERS
    only = tl.full([], -1, tl.int32)
    if temperature == 0:
        only = tl.load(whole(at, 4))
        if law.vocab is not None:
            only = id_of(law, only, only < NO_TOKEN)
    return Row(
        x, row_bits(law, b, i), tl.load(at), scale_of(temperature), tl.load(at + 2),
        least_of(numbers, b), only, tl.load(at + 3), tl.load(at + 1),
    )  # fmt: skip


@triton.jit
def rejected_of(parent, valid, left, n):
    """How many of n's children are deleted."""
    return tl.sum(tl.where((parent == n) & (valid > left), 1, 0), 0)


@triton.jit(do_not_specialize=["T", "W", "max_depth", "count", "seed", "offset", "positions"])
def leaf_first(
    p,
    q,
    p_numbers,
    q_numbers,
    rows,
    tree,
    draws,
    outputs,
    T,
    W,
    max_depth,
    count,
    seed: tl.int64,
    offset: tl.int64,
    positions: tl.int64,
    WITHOUT: tl.constexpr,  # drafted without replacement
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROUNDS: tl.constexpr,  # 2**ROUNDS = BLOCK_T
):
    """rows: scratch fp32 [B, 2, T, NUMBERS]; the other arguments are those of ``walk``."""
    b = tl.program_id(0).to(tl.int64)
    coins = Coins(draws, seed, offset, positions)
    limit = last_node(tree, count, b)
    i, tokens, parent = read_nodes(tree, b, T, p.V, limit, BLOCK_T)
    greedy = temperature_of(p_numbers, b) == 0
    p_rows = rows + b * 2 * T * NUMBERS
    q_rows = p_rows + T * NUMBERS
    last = tl.minimum(limit, T - 1).to(tl.int32)
    leave_numbers(p, p_numbers, b, last, p_rows, BLOCK_C)
    leave_numbers(q, q_numbers, b, last, q_rows, BLOCK_C)
    tl.debug_barrier()  # what threads have written, others read

    # the nodes that exist: those whose ancestors all do, found by doubling
    inside = (i == 0) | ((i < T) & (i <= limit))
    p_kind = tl.load(whole(p_rows, 5) + i * NUMBERS, mask=inside, other=ABSENT)
    q_kind = tl.load(whole(q_rows, 5) + i * NUMBERS, mask=inside, other=ABSENT)
    q_kind = tl.where(greedy, GOOD, q_kind)
    testable = tl.where((p_kind != ABSENT) & (q_kind != ABSENT), 1, 0)
    jump = tl.maximum(parent, 0)
    valid = tl.where((i == 0) | (parent >= 0), 1, 0)
    valid = tl.where(i == 0, 1, valid * tl.gather(testable, jump, 0))
    depth = tl.where(i == 0, 0, 1)
    for _ in tl.static_range(ROUNDS):
        valid = valid * tl.gather(valid, jump, 0)
        depth = depth + tl.gather(depth, jump, 0)
        jump = tl.gather(jump, jump, 0)
    valid = tl.where(depth <= max_depth, valid, 0)

    # all their rows count
    has_child = tl.histogram(tl.maximum(parent, 0), BLOCK_T, mask=(valid > 0) & (i > 0))
    bad = (p_kind == BAD) | ((q_kind == BAD) & (has_child > 0))
    undecided = tl.max(tl.where(bad, valid, 0), 0)

    cur, token = tl.zeros([], tl.int32), tl.full([], -1, tl.int32)
    last_u = last_coin(coins, b, T)
    if greedy:
        undecided = tl.zeros([], tl.int32)
        child = cur
        while child < BLOCK_T:  # down to the first child that is the argmax
            cur = child
            undecided = tl.where(tl.load(whole(p_rows + cur * NUMBERS, 5)) == BAD, 1, 0)
            token = tl.load(whole(p_rows + cur * NUMBERS, 4))
            kids = tl.where((parent == cur) & (tokens == token), valid, 0)
            child = following(tl.where(undecided == 0, kids, 0), i, 0, BLOCK_T)
    elif undecided == 0:
        cur, token = climb(
            p, q, p_numbers, q_numbers, p_rows, q_rows, tree, b, T, i, parent, valid,
            coins, last_u, WITHOUT, CHUNK, BLOCK_C, BLOCK_T,
        )  # fmt: skip
    token = tl.where(tl.load(whole(p_rows + cur * NUMBERS, 5)) == ABSENT, -1, token)

    # the path, from its end
    depth = tl.sum(tl.where(i == cur, depth, 0), 0)
    accepted = tl.where(undecided == 0, depth, -1)
    j = accepted
    while j >= 0:
        at = b * W + j
        tl.store(outputs.path + at, cur)
        tl.store(outputs.tokens + at, token.to(tl.int64))
        if outputs.logprobs is not None:
            logprob = tl.zeros([], tl.float32)
            if token >= 0:
                logprob = log_of(p, row_at(p, p_numbers, p_rows, b, cur), token)
            tl.store(outputs.logprobs + at, logprob)
        token = tl.sum(tl.where(i == cur, tokens, 0), 0)
        cur = tl.maximum(tl.sum(tl.where(i == cur, parent, 0), 0), 0)
        j -= 1
    finish(outputs, b, W, accepted, BLOCK_T)


@triton.jit
def climb(
    p, q, p_numbers, q_numbers, p_rows, q_rows, tree, b, T, i, parent, valid,
    coins, last_u, WITHOUT: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """(last accepted node, last token): a_c = min(1, a_n p'_n(c) / q'_n(c)) on the way down, and
    after a rejected leaf p'_n <- (a_n p'_n - q'_n)+ / S, a_n <- S / (S + 1 - a_n)."""
    cur, a_cur = tl.zeros([], tl.int32), tl.full([], 1.0, tl.float32)
    a = tl.full([BLOCK_T], 1.0, tl.float32)
    left = valid  # not yet deleted
    tests = tl.full([], 1, tl.int32)
    while tests > 0:
        child = following(tl.where(parent == cur, left, 0), i, 0, BLOCK_T)
        u = node_coin(coins, b, cur)
        if child < BLOCK_T:
            # down to the first child that is left
            P, Q = row_at(p, p_numbers, p_rows, b, cur), row_at(q, q_numbers, q_rows, b, cur)
            head = following(tl.where(parent == cur, valid, 0), i, 0, BLOCK_T)
            gone = rejected_of(parent, valid, left, cur)
            x = token_of(tree, b, child)
            p_x, q_x = laws_at(p, q, P, Q, tree, b, T, head, gone, x, WITHOUT, CHUNK)
            a_cur = tl.where(q_x > 0, tl.minimum(a_cur * p_x / q_x, 1.0), 0.0)
            a = tl.where(i == child, a_cur, a)
            cur = child
        elif (cur == 0) | (u < a_cur):
            tests = tests * 0
        else:
            # rejected: what it leaves of its parent's laws
            n = tl.sum(tl.where(i == cur, parent, 0), 0)
            a_n = tl.sum(tl.where(i == n, a, 0.0), 0)
            P, Q = row_at(p, p_numbers, p_rows, b, n), row_at(q, q_numbers, q_rows, b, n)
            head = following(tl.where(parent == n, valid, 0), i, 0, BLOCK_T)
            gone = rejected_of(parent, valid, left, n)
            x = token_of(tree, b, cur)
            masses, spent = residual(
                p, q, P, Q, tree, b, T, head, gone, a_n, x, WITHOUT, CHUNK, BLOCK_C
            )
            S = tl.sum(masses, 0)
            rest = S + (1.0 - a_n)
            sure = rest < 1e-6  # then p' stays
            noted = tl.where(sure, -1.0, tl.where(S > 0, S, 1.0))
            spent = tl.where(spent > 0, spent, float("inf"))
            sibling = following(tl.where(parent == n, left, 0), i, cur, BLOCK_T)
            record(tree, b, T, cur, a_n, noted, spent, sibling)
            left = tl.where(i == cur, 0, left)
            a_cur = tl.where(sure | (n == 0), 1.0, S / tl.where(sure, 1.0, rest))
            a = tl.where(i == n, a_cur, a)
            cur = n

    # the last token, from what is left of the node's law
    token = tl.full([], -1, tl.int32)
    if tl.load(whole(p_rows + cur * NUMBERS, 5)) == GOOD:
        P = row_at(p, p_numbers, p_rows, b, cur)
        gone = rejected_of(parent, valid, left, cur)
        o_c = tl.arange(0, BLOCK_C)
        masses = tl.zeros([BLOCK_C], tl.float32)
        if gone > 0:
            Q = row_at(q, q_numbers, q_rows, b, cur)
            head = following(tl.where(parent == cur, valid, 0), i, 0, BLOCK_T)
            for c in range(p.C):
                b_p, _ = laws_chunk(
                    p, q, P, Q, tree, b, T, head, gone, c * CHUNK, WITHOUT, CHUNK
                )  # fmt: skip
                masses = tl.where(o_c == c, tl.sum(b_p, 0), masses)
            token = draw_left(
                p, q, P, Q, tree, b, T, head, gone, masses, last_u, WITHOUT, CHUNK, BLOCK_C
            )
        else:
            token = draw_whole(p, P, last_u, CHUNK, BLOCK_C)
    return cur, token
