"""The decision of a drafted chain, and its last token; see ``rejection_sample``.

Every program of a request works out the whole decision from a few numbers a row, all drafts at
once. Then the programs share the chunks of the one row that must be resampled, and the last of them
to arrive draws from it.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .draws import coin
from .law_rows import (
    chunk_weights,
    draft_chunk,
    draft_token,
    floor_of,
    least_of,
    place,
    read_law,
    row_bits,
    temperature_of,
    token_log,
    token_weight,
)
from .law_vectors import place_rows, read_floors, read_laws
from .philox import ACCEPT, RESAMPLE
from .vocabulary import crossing, drawn, number, scale_of


class Chains(NamedTuple):
    """The drafted tokens, and how many of them there are."""

    tokens: Any  # [B, G]
    stride_b: Any
    stride_g: Any
    G: Any
    count_of: Any  # [B], or None
    stride_count: Any
    BLOCK: Any  # a power of two above G
    SAMPLED: Any  # drafts came from a law; else each is its own delta
    BY_BLOCK: Any  # the rule


class Outputs(NamedTuple):
    tokens: Any  # int64 [B, G + 1]
    num_accepted: Any  # int32 [B]
    path: Any  # int32 [B, G + 1]
    logprobs: Any  # fp32 [B, G + 1], or None
    num_passed: Any  # int32 [B], or None


@triton.jit
def drafted(chains, b, i):
    """(draft i of request b or 0, whether there is a column i) of a vector i."""
    real = (i >= 0) & (i < chains.G)
    at = chains.tokens + b.to(tl.int64) * chains.stride_b + i * chains.stride_g
    return tl.load(at, mask=real, other=0).to(tl.int64), real


@triton.jit
def test_chain(
    target, numbers, draft, draft_numbers, chains, b, count,
    CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, DRAFT_BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of every draft i at once: (n, p(x_i), q(x_i), rows present, rows bad, draft's rows bad).

    n is the chain's length: it ends before a draft that is not there or cannot be tested.
    """
    i = tl.arange(0, chains.BLOCK)
    limit = number(count, chains.count_of, chains.stride_count, b)
    t = temperature_of(numbers, b)
    scale = scale_of(t)
    at, row, present, inside = place_rows(target, b, i)
    # rows past the count were never worked out
    top, Z, best, good = read_laws(target, at, inside & (i <= limit), scale, BLOCK_C)
    floor, Z = read_floors(target, at, good, Z)
    only = tl.where(t == 0, best, -1)
    Z = tl.where(t == 0, 1.0, Z)
    usable = good & (i * 0 + t >= 0)

    x, real = drafted(chains, b, i)
    known = (x >= 0) & (x < target.V) & real
    token = tl.where(known & usable, x, -1)
    least = least_of(numbers, b)
    bits = row_bits(target, b, i)
    p = token_weight(target, row, bits, token, top, scale, floor, least, only) / Z

    testable = known & present & (i < limit)
    q = tl.full([chains.BLOCK], 1.0, tl.float32)
    bad_draft = i < 0
    if chains.SAMPLED:
        at_q, row_q, present_q, inside_q = place_rows(draft, b, i)
        t_q = temperature_of(draft_numbers, b)
        scale_q = scale_of(t_q)
        top_q, Z_q, best_q, good_q = read_laws(
            draft, at_q, inside_q & (i < limit), scale_q, DRAFT_BLOCK_C
        )
        floor_q, Z_q = read_floors(draft, at_q, good_q, Z_q)
        usable_q = good_q & (i * 0 + t_q >= 0)
        least_q = least_of(draft_numbers, b)
        if draft.vocab is None:
            only_q = tl.where(t_q == 0, best_q, -1)
            token = tl.where(known & usable_q, x, -1)
            bits_q = row_bits(draft, b, i)
            e = token_weight(draft, row_q, bits_q, token, top_q, scale_q, floor_q, least_q, only_q)
        else:  # one at a time, for each searches the vocabulary
            e = tl.zeros([chains.BLOCK], tl.float32)
            for j in range(chains.G):
                here = tl.where(known & usable_q & (i == j), i, -1)
                if tl.max(here, 0) == j:
                    e_j = one_draft(
                        draft, draft_numbers, b, j, tl.max(tl.where(i == j, x, -1), 0),
                        CHUNK, DRAFT_BLOCK_C,
                    )  # fmt: skip
                    e = tl.where(i == j, e_j, e)
        # a greedy request's drafts are tested as deltas, and their law is not read
        q = tl.where(t == 0, 1.0, e / tl.where(t_q == 0, 1.0, Z_q))
        testable = testable & (present_q | (i * 0 + t == 0))
        bad_draft = present_q & ((usable_q & (i >= 0)) == 0) & (i * 0 + t != 0)
    n = tl.min(tl.where(testable, chains.BLOCK, i), 0)
    return n, p, q, present, present & (usable == 0), bad_draft


@triton.jit
def one_draft(draft, numbers, b, j, token, CHUNK: tl.constexpr, DRAFT_BLOCK_C: tl.constexpr):
    """e(token) of the draft's row j, by a scalar's way."""
    j = b * 0 + j
    at, row, _present, _inside = place(draft, b, j)
    t = temperature_of(numbers, b)
    scale = scale_of(t)
    top, Z, best, _good = read_law(draft, at, scale, DRAFT_BLOCK_C)
    floor, _Z = floor_of(draft, at, Z)
    return draft_token(
        draft,
        row,
        token,
        top,
        scale,
        floor,
        least_of(numbers, b),
        tl.where(t == 0, best, -1),
        CHUNK,
    )


@triton.jit
def chain_scales(p, q, G, BLOCK: tl.constexpr):
    """pi_0..pi_G of the block rule: pi_i = min(1, pi_{i-1} p(x_i) / q(x_i)), 0 where q is 0."""
    i = tl.arange(0, BLOCK)
    scales = tl.where(i == 0, 1.0, 0.0)
    pi = tl.full([], 1.0, tl.float32)
    for j in range(G):
        p_j = tl.sum(tl.where(i == j, p, 0.0), 0)
        q_j = tl.sum(tl.where(i == j, q, 0.0), 0)
        # compared before it is divided, so that nothing overflows
        pi = tl.where(pi * p_j < q_j, pi * p_j / tl.where(q_j > 0, q_j, 1.0), 1.0)
        pi = tl.where(q_j > 0, pi, 0.0)
        scales = tl.where(i == j + 1, pi, scales)
    return scales


@triton.jit
def remaining(
    target, numbers, draft, draft_numbers, chains, b, i, pi, x, start, whole,
    CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, DRAFT_BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(relu(pi p - q), p) of row i on a chunk; ``whole``: p - 0, for there is no draft to take."""
    at, row, _present, _inside = place(target, b, i)
    t = temperature_of(numbers, b)
    scale = scale_of(t)
    top, Z, best, _good = read_law(target, at, scale, BLOCK_C)
    floor, Z = floor_of(target, at, Z)
    only = tl.where(t == 0, best, -1)
    least = least_of(numbers, b)
    bits = row_bits(target, b, i)
    p = chunk_weights(target, row, bits, start, top, scale, floor, least, only, CHUNK)
    p = p / tl.where(t == 0, 1.0, Z)
    delta = tl.where(start + tl.arange(0, CHUNK) == x, 1.0, 0.0)
    q = delta
    if chains.SAMPLED:  # noqa: SIM102
        if (t != 0) & (whole == 0):
            at_q, row_q, _present, _inside = place(draft, b, i)
            t_q = temperature_of(draft_numbers, b)
            scale_q = scale_of(t_q)
            top_q, Z_q, best_q, _good = read_law(draft, at_q, scale_q, DRAFT_BLOCK_C)
            floor_q, Z_q = floor_of(draft, at_q, Z_q)
            least_q = least_of(draft_numbers, b)
            only_q = tl.where(t_q == 0, best_q, -1)
            q = draft_chunk(draft, row_q, start, top_q, scale_q, floor_q, least_q, only_q, CHUNK)
            q = q / tl.where(t_q == 0, 1.0, Z_q)
    rest = tl.maximum(pi * p - tl.where(whole != 0, 0.0, q), 0.0)
    return rest, p


@triton.jit(do_not_specialize=["count", "per"])
def block_sums(
    target, numbers, draft, draft_numbers, chains, sums, count, per,
    CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, DRAFT_BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sums [B, G, C]: of relu(pi_i p_i - q_i) on each chunk, 1 <= i < n."""
    b, j = tl.program_id(0) // chains.G, tl.program_id(0) % chains.G
    if temperature_of(numbers, b) != 0:
        n, p, q, _present, _bad, _bad_draft = test_chain(
            target, numbers, draft, draft_numbers, chains, b, count, CHUNK, BLOCK_C, DRAFT_BLOCK_C
        )
        if (j >= 1) & (j < n):
            i = tl.arange(0, chains.BLOCK)
            pi = tl.sum(tl.where(i == j, chain_scales(p, q, chains.G, chains.BLOCK), 0.0), 0)
            first = tl.program_id(1) * per
            for c in range(first, tl.minimum(first + per, target.C)):
                rest, _p = remaining(
                    target, numbers, draft, draft_numbers, chains, b, j, pi, -1, c * CHUNK, 0,
                    CHUNK, BLOCK_C, DRAFT_BLOCK_C,
                )  # fmt: skip
                at = (b.to(tl.int64) * chains.G + j) * target.C + c
                tl.store(sums + at, tl.sum(rest, 0))


@triton.jit(do_not_specialize=["count", "seed", "offset", "positions", "parts"])
def decide(
    target, numbers, draft, draft_numbers, chains, draws, outputs, sums, masses, arrivals,
    count, seed: tl.int64, offset: tl.int64, positions: tl.int64, parts,
    CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, DRAFT_BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The verdict on request b, by ``parts`` programs."""
    b, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    G = chains.G
    i = tl.arange(0, chains.BLOCK)
    n, p, q, present, bad, bad_draft = test_chain(
        target, numbers, draft, draft_numbers, chains, b, count, CHUNK, BLOCK_C, DRAFT_BLOCK_C
    )
    t = temperature_of(numbers, b)
    u = coin(ACCEPT, draws, seed, offset, positions, b, i, i.to(tl.int64), i < G)
    u = tl.where(t == 0, 0.0, u)
    accept = (i < n) & (q > 0) & (u * q < p)
    tau = tl.min(tl.where(accept, chains.BLOCK, i), 0)
    last_read = tau
    pi = tl.full([], 1.0, tl.float32)
    if chains.BY_BLOCK:  # noqa: SIM102
        if t != 0:
            # h_i = S_i / (S_i + 1 - pi_i) for 0 < i < n, h_n = pi_n; the last i with u_i < h_i
            scales = chain_scales(p, q, G, chains.BLOCK)
            c = tl.arange(0, BLOCK_C)
            at = (b.to(tl.int64) * G + i)[:, None] * target.C + c[None, :]
            inner = ((i >= 1) & (i < n))[:, None] & (c < target.C)[None, :]
            S = tl.sum(tl.load(sums + at, mask=inner, other=0.0), 1)
            denominator = S + (1 - scales)
            h = tl.where(denominator < 1e-6, 1.0, S / denominator)
            h = tl.where(i == n, scales, h)
            u = coin(ACCEPT, draws, seed, offset, positions, b, i - 1, i.to(tl.int64) - 1, i > 0)
            tau = tl.max(tl.where((i >= 1) & (i <= n) & (u < h), i, 0), 0)
            last_read = n
            pi = tl.sum(tl.where(i == tau, scales, 0.0), 0)
    read = (bad & (i <= last_read)) | (bad_draft & (i < n) & (i <= last_read))
    decided = tl.max(tl.where(read, 1, 0), 0) == 0
    drawing = decided & (tl.max(tl.where(present & (i == tau), 1, 0), 0) == 1)

    # the programs share the chunks of the row that is resampled
    token = drafted_at(chains, b, tau)
    whole = tl.where(tau == n, 1, 0)
    left, right = masses + b.to(tl.int64) * 2 * target.C, target.C
    if drawing:
        per = tl.cdiv(target.C, parts)
        for c in range(part * per, tl.minimum(part * per + per, target.C)):
            rest, p_c = remaining(
                target, numbers, draft, draft_numbers, chains, b, tau, pi, token, c * CHUNK, whole,
                CHUNK, BLOCK_C, DRAFT_BLOCK_C,
            )  # fmt: skip
            tl.store(left + c, tl.sum(rest, 0))
            tl.store(left + right + c, tl.sum(p_c, 0))
    arrived = part * 0
    tl.debug_barrier()  # one thread stores the sums, others read them: also where it has all parts
    if parts > 1:
        arrived = tl.atomic_add(arrivals + b, 1, sem="acq_rel")
        tl.debug_barrier()
    if arrived == parts - 1:
        y = tl.full([], -1, tl.int64)
        if drawing:
            u_y = last_coin(draws, seed, offset, positions, b, G)
            u_y = tl.where(t == 0, 0.0, u_y)
            c = tl.arange(0, BLOCK_C)
            rest_c = tl.load(left + c, mask=c < target.C, other=0.0, cache_modifier=".cg")
            p_c = tl.load(left + right + c, mask=c < target.C, other=0.0, cache_modifier=".cg")
            fall_back = (tau == n) | (tl.sum(rest_c, 0) <= 0)
            m = tl.where(fall_back, p_c, rest_c)
            chunk, before, goal = crossing(m, u_y, BLOCK_C)
            chunk = tl.minimum(chunk, target.C - 1)
            rest, p_v = remaining(
                target, numbers, draft, draft_numbers, chains, b, tau, pi, token, chunk * CHUNK,
                whole, CHUNK, BLOCK_C, DRAFT_BLOCK_C,
            )  # fmt: skip
            w = tl.where(fall_back, p_v, rest)
            y = drawn(w, before, goal, chunk * CHUNK, CHUNK).to(tl.int64)
        x, _real = drafted(chains, b, i)
        emitted = tl.where(i < tau, x, tl.where(i == tau, y, -1))
        kept = (i <= tau) & (i * 0 + tl.where(decided, 1, 0) == 1)
        emitted = tl.where(kept, emitted, -1)
        row = b.to(tl.int64) * (G + 1) + i
        tl.store(outputs.tokens + row, emitted, mask=i <= G)
        tl.store(outputs.path + row, tl.where(kept, i, -1), mask=i <= G)
        tl.store(outputs.num_accepted + b, tl.where(decided, tau, 0))
        if outputs.num_passed is not None:  # each draft by its own draw, whatever went before
            passed = tl.sum(tl.where(accept, 1, 0), 0)
            tl.store(outputs.num_passed + b, tl.where(decided, passed, 0))
        if outputs.logprobs is not None:
            scale = scale_of(t)
            at, pointers, _present, inside = place_rows(target, b, i)
            top, Z, _best, good = read_laws(target, at, inside & kept, scale, BLOCK_C)
            bits = row_bits(target, b, i)
            known = tl.where(good, emitted, -1)
            log = token_log(target, pointers, bits, known, top, scale, Z)
            tl.store(outputs.logprobs + row, tl.where(emitted >= 0, log, 0.0), mask=i <= G)


@triton.jit
def drafted_at(chains, b, i):
    """Draft i, a scalar; -1 past the last column."""
    at = chains.tokens + b.to(tl.int64) * chains.stride_b + i * chains.stride_g
    return tl.load(at, mask=i < chains.G, other=-1).to(tl.int64)


@triton.jit
def last_coin(draws, seed, offset, positions, b, G):
    """The correction's or bonus's uniform: column G, or index -1."""
    one = tl.arange(0, 1)
    u = coin(RESAMPLE, draws, seed, offset, positions, b, one + G, (one - 1).to(tl.int64), one == 0)
    return tl.max(u, 0)
