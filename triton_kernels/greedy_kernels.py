"""The verdict on a chain or tree by the argmax of its rows; see ``verify_greedy``."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .law_rows import (
    chunk_weights,
    place,
    read_law,
    row_bits,
    temperature_of,
    token_log,
    token_value,
)
from .law_vectors import place_rows, read_floors, read_laws, read_sums
from .vocabulary import INFINITY, number, scale_of

EXACT, TOP_K, DISTANCE, TYPICAL = (tl.constexpr(n) for n in range(4))
RULES = ("exact", "top_k", "distance", "typical")


class Drafted(NamedTuple):
    """The drafted nodes. A chain is the tree in which every node has one child."""

    tokens: Any  # [B, G] of a chain, whose node i + 1 is draft i, or [B, T] of a tree
    stride_b: Any
    stride_t: Any
    parents: Any  # [B|1, T], or None: a chain
    stride_parents_b: Any  # 0 where requests share them, as ``plain`` has it
    stride_parents_t: Any
    count_of: Any
    stride_count: Any
    T: Any
    BLOCK: Any  # a power of two, T or more
    FIRST_MATCH: Any


@triton.jit(do_not_specialize=["count", "per"])
def entropies(
    target, numbers, drafted, sums, count, per, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr
):
    """sums fp32 [B T, C]: what each chunk adds to its row's entropy -sum p log(p + 1e-5)."""
    b, i = tl.program_id(0) // target.R, tl.program_id(0) % target.R
    at, row, _present, inside = place(target, b, i)
    if inside & (i <= number(count, drafted.count_of, drafted.stride_count, b)):
        bits = row_bits(target, b, i)
        scale = scale_of(temperature_of(numbers, b))
        top, Z, _best, good = read_law(target, at, scale, BLOCK_C)
        if good:
            first = tl.program_id(1) * per
            for c in range(first, tl.minimum(first + per, target.C)):
                p = chunk_weights(
                    target, row, bits, c * CHUNK, top, scale, -INFINITY, 0.0, -1, CHUNK
                )
                p /= Z
                tl.store(sums + at * target.C + c, -tl.sum(p * tl.log(p + 1e-5), 0))


@triton.jit
def best_ids(target, b, i, mask):
    """(the target's id of rows i, present, whether it is one) where the target is ids [rows]."""
    if target.index is None:
        at = b.to(tl.int64) * target.stride_b + i.to(tl.int64) * target.stride_r
        present, inside = mask, mask
    else:
        where = target.index + b.to(tl.int64) * target.stride_index_b
        index = tl.load(where + i.to(tl.int64) * target.stride_index_r, mask=mask, other=-1)
        index = index.to(tl.int64)
        present = mask & (index != -1)
        inside = mask & (index >= 0) & (index < (target.num_rows >> 2))
        at = tl.where(inside, index, 0) * target.stride_r
    best = tl.load(target.x + at, mask=inside, other=-1).to(tl.int64)
    return best, present, inside & (best >= 0)


@triton.jit(do_not_specialize=["count"])
def walk(
    target, numbers, drafted, sums, scratch, tokens, num_accepted, path,
    count, width, distance, threshold, alpha,
    RULE: tl.constexpr, IDS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One request: which nodes pass the test of their parent's row, and the deepest walk of them.

    ``width``: of the results, a root and max_depth more. ``scratch`` int32 [B, BLOCK] is for
    first_match alone, ``sums`` of ``entropies`` for the typical rule.
    """
    b = tl.program_id(0)
    node = tl.arange(0, drafted.BLOCK)
    T = drafted.T
    limit = number(count, drafted.count_of, drafted.stride_count, b)
    words = drafted.tokens + b.to(tl.int64) * drafted.stride_b
    if drafted.parents is None:
        parent = node - 1
        real = (node > 0) & (node < T)
        token = tl.load(words + (node - 1).to(tl.int64) * drafted.stride_t, mask=real, other=-1)
    else:
        above = drafted.parents + b.to(tl.int64) * (drafted.stride_parents_b >> 2)
        at = above + node.to(tl.int64) * drafted.stride_parents_t
        parent = tl.load(at, mask=node < T, other=-1).to(tl.int64)
        real = (node > 0) & (node < T) & (parent >= 0) & (parent < node)
        token = tl.load(words + node.to(tl.int64) * drafted.stride_t, mask=node < T, other=-1)
    token = token.to(tl.int64)
    exists = real & (node <= limit) & (token >= 0)
    if not IDS:
        exists = exists & (token < target.V)
    parent = tl.where(exists, parent, 0).to(tl.int32)

    # the test, by what the parent's row says
    score = tl.zeros([drafted.BLOCK], tl.float32)
    if IDS:
        best, present, good = best_ids(target, b, parent, exists)
        passes = exists & (tl.abs(token - best) <= distance)
    else:
        t = temperature_of(numbers, b)
        scale = scale_of(t)
        at, row, present, inside = place_rows(target, b, parent)
        top, Z, best, good = read_laws(target, at, exists & inside, scale, BLOCK_C)
        best = best.to(tl.int64)
        passes = exists & (tl.abs(token - best) <= distance)
        bits = row_bits(target, b, parent)
        known = tl.where(exists & good, token, -1)
        if RULE == TOP_K:
            x = token_value(target, row, bits, known)
            floor, _mass = read_floors(target, at, exists & good, Z)
            k = number(numbers.top_k, numbers.top_k_of, numbers.stride_top_k, b)
            # k below 1 counts as 1, and beside +inf nothing passes
            floor = tl.where((node * 0 + k < 1) | (top == INFINITY), top, floor)
            passes = exists & (x >= floor) & (x > -INFINITY)
        if RULE == TYPICAL:
            good = good & (node * 0 + t >= 0)
            score = token_log(target, row, bits, known, top, scale, Z)
            entropy = read_sums(sums, at, exists & good, target.C, BLOCK_C)
            p = tl.exp(score)
            typical = exists & (p > tl.minimum(alpha * tl.exp(-entropy), threshold))
            greedy = node * 0 + t == 0
            passes = (passes & greedy) | (typical & (greedy == 0))
            score = tl.where(p > 0, score, -INFINITY)
    passes = passes & good & present
    if drafted.FIRST_MATCH:  # the lowest child of each node that passes
        mine = tl.where(passes, parent, -1)
        tl.store(scratch + b * drafted.BLOCK + node, mine)
        tl.debug_barrier()
        AT_ONCE: tl.constexpr = 2048 // drafted.BLOCK
        for start in range(0, T, AT_ONCE):
            other = start + tl.arange(0, AT_ONCE)
            theirs = tl.load(scratch + b * drafted.BLOCK + other, mask=other < T, other=-1)
            earlier = (theirs[None, :] == mine[:, None]) & (other[None, :] < node[:, None])
            passes = passes & (tl.max(tl.where(earlier, 1, 0), 1) == 0)

    # accepted: passed, on an accepted parent; one more level a turn
    depth = tl.where(node == 0, 0, -1)
    total = tl.zeros([drafted.BLOCK], tl.float32)
    level, grows = 1, tl.full([], 1, tl.int32)
    while (grows > 0) & (level < width):
        below = passes & (tl.gather(depth, parent, 0) == level - 1) & (depth < 0)
        depth = tl.where(below, level, depth)
        if RULE == TYPICAL:
            total = tl.where(below, tl.gather(total, parent, 0) + score, total)
        grows = tl.max(tl.where(below, 1, 0), 0)
        level += 1

    # the deepest, then (typical) the likeliest, then the lowest index
    tau = tl.max(depth, 0)
    deepest = depth == tau
    if RULE == TYPICAL:
        likeliest = tl.max(tl.where(deepest, total, -INFINITY), 0)
        deepest = deepest & (total == likeliest)
    leaf = tl.min(tl.where(deepest, node, drafted.BLOCK), 0)

    # bad rows that were read: of accepted nodes with a child to test, and the last one
    above = tl.gather(depth, parent, 0)
    bad = exists & (above >= 0) & (above < width - 1) & present & (good == 0)
    decided = tl.max(tl.where(bad, 1, 0), 0) == 0
    if IDS:
        one = leaf + tl.arange(0, 1)
        best_1, present_1, good_1 = best_ids(target, b, one, one < T)
        last = tl.max(best_1, 0)
        here = tl.max(tl.where(present_1, 1, 0), 0) == 1
        whole = tl.max(tl.where(good_1, 1, 0), 0) == 1
    else:
        at_1, _row, here, inside_1 = place(target, b, leaf)
        last = tl.full([], -1, tl.int64)
        whole = here & (leaf < 0)
        if inside_1:
            _top, _Z, best_2, good_2 = read_law(target, at_1, scale, BLOCK_C)
            last = best_2.to(tl.int64)
            whole = good_2
            if RULE == TYPICAL:
                whole = whole & (t >= 0)
    decided = decided & ((here == 0) | whole)
    last = tl.where(here, last, -1)

    # the path, from the leaf up
    step = tl.arange(0, drafted.BLOCK)
    nodes = tl.where(step == tau, leaf, -1)
    words = tl.where(step == tau, last, tl.full([drafted.BLOCK], -1, tl.int64))
    at = leaf
    for up in range(tau):
        word = tl.max(tl.where(node == at, token, -1), 0)
        at = tl.max(tl.where(node == at, parent, -1), 0)
        nodes = tl.where(step == tau - 1 - up, at, nodes)
        words = tl.where(step == tau - 1 - up, word, words)
    result = b.to(tl.int64) * width + step
    tl.store(tokens + result, tl.where(decided, words, -1), mask=step < width)
    tl.store(path + result, tl.where(decided, nodes, -1), mask=step < width)
    tl.store(num_accepted + b, tl.where(decided, tau, 0))
