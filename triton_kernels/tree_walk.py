"""The walk from the root: a program takes one request, and reads no row that it does not reach.

At each node: its target row; its draft row if a child is to be tested; the children in index order;
then on to the accepted child, or the last token. A rejected child costs one more pass over the two
rows, which the L2 cache still has, for what it leaves of p.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .law_rows import temperature_of
from .tree_rows import (
    Coins,
    following,
    last_coin,
    last_node,
    log_of,
    node_coin,
    read_nodes,
    read_row,
    token_of,
)
from .tree_rules import test_alone, test_in_turn, test_k, test_together

WALKS, ENDS, UNDECIDED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


class Outputs(NamedTuple):
    """All contiguous."""

    tokens: Any  # int64 [B, W]
    num_accepted: Any  # int32 [B]
    path: Any  # int32 [B, W]
    logprobs: Any  # fp32 [B, W], or None


@triton.jit(do_not_specialize=["T", "W", "max_depth", "count", "seed", "offset", "positions"])
def walk(
    p,
    q,
    p_numbers,
    q_numbers,
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
    threshold_single,
    threshold_acc,
    RULE: tl.constexpr,  # recursive, without_replacement, k_seq, delta or target_only
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HALVINGS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    coins = Coins(draws, seed, offset, positions)
    limit = last_node(tree, count, b)
    i, tokens, parent = read_nodes(tree, b, T, p.V, limit, BLOCK_T)
    last_u = last_coin(coins, b, T)
    greedy = temperature_of(p_numbers, b) == 0

    cur, depth = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    state = tl.zeros([], tl.int32) + WALKS
    tl.store(outputs.path + b * W, 0)
    while state == WALKS:
        # the node's target row, and its children that exist
        P, masses, best, present, good = read_row(p, p_numbers, b, cur, CHUNK, BLOCK_C)
        kids = tl.where(parent == cur, 1, 0)
        kids = tl.where(good & (depth < max_depth), kids, 0)
        if RULE != "delta" and RULE != "target_only":  # noqa: SIM102 ("and" would look into None)
            if q.index is not None:
                at = b * q.stride_index_b + cur.to(tl.int64) * q.stride_index_r
                kids = tl.where(greedy | (tl.load(q.index + at) != -1), kids, 0)

        # one of them, or else the last token
        chosen, token = tl.full([], BLOCK_T, tl.int32), tl.full([], -1, tl.int32)
        decided = good | (present == 0)
        if good:
            if greedy:
                chosen = following(tl.where(tokens == best, kids, 0), i, 0, BLOCK_T)
                token = best
            elif RULE == "delta":
                chosen, token = test_alone(
                    p, P, tree, b, T, i, kids, tokens, masses, coins, last_u,
                    CHUNK, BLOCK_C, BLOCK_T,
                )  # fmt: skip
            elif RULE == "target_only":
                u = node_coin(coins, b, cur)
                chosen, token = test_together(
                    p, P, tree, b, T, i, kids, tokens, masses, u, last_u, threshold_single,
                    threshold_acc, CHUNK, BLOCK_C, BLOCK_T,
                )  # fmt: skip
            elif RULE == "k_seq":
                chosen, token, decided = test_k(
                    p, q, P, q_numbers, tree, b, cur, i, kids, masses, coins, last_u,
                    CHUNK, BLOCK_C, BLOCK_T, HALVINGS,
                )  # fmt: skip
            else:
                chosen, token, decided = test_in_turn(
                    p, q, P, q_numbers, tree, b, T, cur, i, kids, masses, coins, last_u,
                    RULE == "without_replacement", CHUNK, BLOCK_C, BLOCK_T,
                )  # fmt: skip
            if chosen < BLOCK_T:
                token = token_of(tree, b, chosen)
            if decided:
                tl.store(outputs.tokens + b * W + depth, token.to(tl.int64))
                if outputs.logprobs is not None:
                    tl.store(outputs.logprobs + b * W + depth, log_of(p, P, token))
        if decided & (chosen < BLOCK_T):
            cur = chosen
            depth += 1
            tl.store(outputs.path + b * W + depth, cur)
        else:
            state = tl.where(decided, ENDS, UNDECIDED)
            if present == 0:
                tl.store(outputs.tokens + b * W + depth, tl.full([], -1, tl.int64))
                if outputs.logprobs is not None:
                    tl.store(outputs.logprobs + b * W + depth, 0.0)
    finish(outputs, b, W, tl.where(state == UNDECIDED, -1, depth), BLOCK_T)


@triton.jit
def finish(outputs, b, W, depth, BLOCK: tl.constexpr):
    """Blanks what lies past the last token; all of it if depth is -1 (undecided)."""
    tl.debug_barrier()
    tl.store(outputs.num_accepted + b, tl.maximum(depth, 0))
    for start in range(0, W, BLOCK):
        j = start + tl.arange(0, BLOCK)
        rest = (j > depth) & (j < W)
        blank = tl.full([BLOCK], -1, tl.int32)
        tl.store(outputs.tokens + b * W + j, blank.to(tl.int64), mask=rest)
        tl.store(outputs.path + b * W + j, blank, mask=rest)
        if outputs.logprobs is not None:
            tl.store(outputs.logprobs + b * W + j, tl.zeros([BLOCK], tl.float32), mask=rest)
