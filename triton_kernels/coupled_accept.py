"""Universal coupling in two launches: the noisiest token of each chunk of the mixture, the prefix.

y_i = argmax((R l_D + (1 - R) l_A) / T + g_i), see the reference. A row in which either model has
+inf, whose mass is shared before the two are mixed, is worked out again by the second launch.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay import launch
from . import configurations
from .devices import architecture, on_device_of, table_of
from .gumbel import noisiest, perturbed
from .law_arguments import pair
from .law_prepare import CHUNK
from .numerics import power_of_two
from .philox import DRAFT, chunk_gumbel
from .rows import keys_of, offset_of, per_request, position_of, seed_of
from .static_call import StaticCall
from .vocabulary import INFINITY, NO_TOKEN, as_scalar, chunks_a_program, load_chunk, number, top_of

CONFIGURATIONS = configurations.load("coupled_accept")
# what a chunk says of its rows besides its noisiest token
NAN, DRAFT_INFINITE, VERIFIER_INFINITE, DRAFT_ALLOWS = (tl.constexpr(1 << n) for n in range(4))


@triton.jit
def weighted(weight, x):
    """weight * x; the law to the power 0 is 1 where it is 0 (weight 0 and x = -inf) too."""
    nothing = tl.where(x == -INFINITY, weight, 1.0) == 0
    return tl.where(nothing, 0.0, weight * x)


@triton.jit
def shared(x, infinite):
    """Logits whose +inf entries share the mass, where there are any."""
    split = tl.where(x == INFINITY, 0.0, tl.where(x == x, -INFINITY, x))
    return tl.where(infinite != 0, split, x)


@triton.jit
def mixture(
    draft, verifier, start, V, ratio, draft_infinite, verifier_infinite, CHUNK: tl.constexpr
):
    """(mixed logits of a chunk, the draft's, the verifier's); past V they are -inf."""
    x = load_chunk(draft, start, V, float("-inf"), CHUNK)
    y = load_chunk(verifier, start, V, float("-inf"), CHUNK)
    mixed = weighted(ratio, shared(x, draft_infinite))
    mixed += weighted(1 - ratio, shared(y, verifier_infinite))
    at = start + tl.arange(0, CHUNK)
    return tl.where(at < V, mixed, -INFINITY), x, y


@triton.jit
def any_of(x):
    return tl.max(tl.where(x, 1, 0), 0)


@triton.jit(do_not_specialize=["per"])
def mixed_chunks(
    draft, verifier, stride_draft_b, stride_draft_m, stride_verifier_b, stride_verifier_m,
    ratio, ratio_of, stride_ratio, temperature, temperature_of, stride_temperature, keys,
    stats, M, V, C, per, PER_REQUEST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """stats fp32 [B M, 4, C]: top, noisiest value (less the top), its token, flags (int32)."""
    b, i = (tl.program_id(0) // M).to(tl.int64), (tl.program_id(0) % M).to(tl.int64)
    R = as_scalar(number(ratio, ratio_of, stride_ratio, b), tl.float32)
    t = as_scalar(number(temperature, temperature_of, stride_temperature, b), tl.float32)
    draft += b * stride_draft_b + i * stride_draft_m
    verifier += b * stride_verifier_b + i * stride_verifier_m
    seed, offset = seed_of(keys, b, PER_REQUEST), offset_of(keys, b)
    position = position_of(keys, b, i)
    first = tl.program_id(1) * per
    for c in range(first, tl.minimum(first + per, C)):
        mixed, x, y = mixture(draft, verifier, c * CHUNK, V, R, 0, 0, CHUNK)
        top, _best = top_of(mixed, c * CHUNK, CHUNK)
        noise = chunk_gumbel(DRAFT, seed, offset, position, c * CHUNK, CHUNK)
        noise = tl.where(t == 0, 0.0, noise)
        value, at = noisiest(mixed, top, t, noise, c * CHUNK, CHUNK)
        flags = any_of(x != x) * NAN | any_of(x > -INFINITY) * DRAFT_ALLOWS
        flags |= any_of(x == INFINITY) * DRAFT_INFINITE | any_of(y == INFINITY) * VERIFIER_INFINITE
        line = stats + tl.program_id(0).to(tl.int64) * 4 * C + c
        tl.store(line, top)
        tl.store(line + C, value)
        words = (line + 2 * C).to(tl.pointer_type(tl.int32))
        tl.store(words, at)
        tl.store(words + C, flags)


@triton.jit
def accepted_prefix(
    draft, verifier, stride_draft_b, stride_draft_m, stride_verifier_b, stride_verifier_m,
    ratio, ratio_of, stride_ratio, temperature, temperature_of, stride_temperature, keys,
    tokens, stride_tokens_b, stride_tokens_m, stats, num_accepted, M, V, C,
    FORCE_FIRST: tl.constexpr, PER_REQUEST: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """num_accepted int32 [B]: the length of the run of rows whose noisiest token was drafted."""
    b = tl.program_id(0).to(tl.int64)
    i, c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C)
    R = as_scalar(number(ratio, ratio_of, stride_ratio, b), tl.float32)
    t = as_scalar(number(temperature, temperature_of, stride_temperature, b), tl.float32)
    line = stats + ((b * M + i) * 4 * C)[:, None] + c[None, :]
    mask = (i < M)[:, None] & (c < C)[None, :]
    words = line.to(tl.pointer_type(tl.int32))
    tops = tl.load(line, mask=mask, other=-INFINITY)
    values = tl.load(line + C, mask=mask, other=-INFINITY)
    places = tl.load(words + 2 * C, mask=mask, other=NO_TOKEN)
    flags = tl.load(words + 3 * C, mask=mask, other=0)
    number_there = tops == tops
    top = tl.max(tl.where(number_there, tops, -INFINITY), 1)
    usable = (tl.max(flags & NAN, 1) == 0) & (tl.max(flags & DRAFT_ALLOWS, 1) > 0)
    whole = (tl.max(tl.where(number_there, 0, 1), 1) == 0) & (top > -INFINITY)
    values = perturbed(tl.where(number_there, tops, -INFINITY), top[:, None], t, values)
    largest = tl.max(values, 1)
    y = tl.min(tl.where(values == largest[:, None], places, NO_TOKEN), 1)
    odd = tl.max(flags & DRAFT_INFINITE, 1) | tl.max(flags & VERIFIER_INFINITE, 1)
    if tl.max(odd, 0) > 0:
        seed, offset = seed_of(keys, b, PER_REQUEST), offset_of(keys, b)
        for m in range(M):
            row = b * 0 + m
            flag = tl.max(tl.where(i == row, odd, 0), 0)
            if flag > 0:
                x = draft + b * stride_draft_b + row * stride_draft_m
                z = verifier + b * stride_verifier_b + row * stride_verifier_m
                d, v = flag & DRAFT_INFINITE, flag & VERIFIER_INFINITE
                highest = tl.full([], float("-inf"), tl.float32)
                nan = tl.full([], 0, tl.int32)
                for chunk in range(C):
                    mixed, _x, _y = mixture(x, z, chunk * CHUNK, V, R, d, v, CHUNK)
                    nan |= any_of(mixed != mixed)
                    mixed = tl.where(mixed == mixed, mixed, -INFINITY)
                    highest = tl.maximum(highest, tl.max(mixed, 0))
                position = position_of(keys, b, row)
                token, most = tl.full([], 0, tl.int32), tl.full([], float("-inf"), tl.float32)
                for chunk in range(C):
                    mixed, _x, _y = mixture(x, z, chunk * CHUNK, V, R, d, v, CHUNK)
                    noise = chunk_gumbel(DRAFT, seed, offset, position, chunk * CHUNK, CHUNK)
                    noise = tl.where(t == 0, 0.0, noise)
                    value, at = noisiest(mixed, highest, t, noise, chunk * CHUNK, CHUNK)
                    token = tl.where(value > most, at, token)
                    most = tl.maximum(most, value)
                y = tl.where(i == row, token, y)
                fine = tl.where((nan == 0) & (highest > -INFINITY), 1, 0)
                whole = tl.where(i == row, i * 0 + fine == 1, whole)
    drafted = tokens + b * stride_tokens_b + i.to(tl.int64) * stride_tokens_m
    x = tl.load(drafted, mask=i < M, other=-1).to(tl.int64)
    good = usable & whole & (x >= 0) & (x < V) & (i * 0 + t >= 0)
    accept = good & (y == x)
    if FORCE_FIRST:
        accept = accept | (good & (i == 0))
    tl.store(num_accepted + b, tl.min(tl.where(accept, BLOCK_M, i), 0))


def coupled_accept(
    draft_logits: Tensor,
    verifier_logits: Tensor,
    tokens: Tensor,
    ratio: float,
    ratio_tensor: Tensor | None,
    temperature: float,
    temperature_tensor: Tensor | None,
    seed: int,
    seed_tensor: Tensor | None,
    offset: int,
    offset_tensor: Tensor | None,
    positions: Tensor | None,
    force_first: bool,
) -> Tensor:
    """Logits [B, M, V], tokens [B, M] -> num_accepted int32 [B]."""
    B, M, V = draft_logits.shape
    if B * M == 0:
        return torch.zeros(B, dtype=torch.int32, device=draft_logits.device)
    num_accepted = torch.empty(B, dtype=torch.int32, device=draft_logits.device)
    stats = torch.empty((B * M, 4, -(-V // CHUNK)), dtype=torch.float32, device=draft_logits.device)
    keys = keys_of(seed, seed_tensor, offset, offset_tensor, positions, None)
    common, both = arguments(
        draft_logits, verifier_logits, (float(ratio), ratio_tensor),
        (float(temperature), temperature_tensor), keys, stats, per_request(seed_tensor),
    )  # fmt: skip
    C = stats.shape[2]
    per, arch = chunks_a_program(B * M, C), architecture(draft_logits)
    with on_device_of(draft_logits):
        grid = (B * M, -(-C // per))
        launch(mixed_chunks, grid, **common, per=per, **CONFIGURATIONS[("chunks", arch)])
        launch(
            accepted_prefix, (B,), **common, **decision(tokens, num_accepted, force_first, both),
            **CONFIGURATIONS[("prefix", arch)],
        )  # fmt: skip
    return num_accepted


def arguments(
    draft: Tensor, verifier: Tensor, ratio: Any, temperature: Any, keys: Any, stats: Tensor,
    each: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """What both kernels take, and the second's blocks."""
    _B, M, V = draft.shape
    C = stats.shape[2]
    R, R_of, stride_ratio = pair(*ratio)
    t, t_of, stride_temperature = pair(*temperature)
    return dict(
        draft=draft, verifier=verifier,
        stride_draft_b=draft.stride(0), stride_draft_m=draft.stride(1),
        stride_verifier_b=verifier.stride(0), stride_verifier_m=verifier.stride(1),
        ratio=R, ratio_of=R_of, stride_ratio=stride_ratio,
        temperature=t, temperature_of=t_of, stride_temperature=stride_temperature,
        keys=keys, stats=stats, M=M, V=V, C=C, PER_REQUEST=each,
    ), dict(BLOCK_M=power_of_two(M + 1), BLOCK_C=power_of_two(C))  # fmt: skip


def decision(
    tokens: Tensor, num_accepted: Tensor, force_first: bool, blocks: dict[str, Any]
) -> dict[str, Any]:
    return dict(
        tokens=tokens, stride_tokens_b=tokens.stride(0), stride_tokens_m=tokens.stride(1),
        num_accepted=num_accepted, FORCE_FIRST=force_first, **blocks,
    )  # fmt: skip


def static_calls(arch: str) -> Iterator[StaticCall]:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    B, M, V = 8, 8, 151936
    for dtype, odd in (
        (torch.bfloat16, False),
        (torch.float16, False),
        (torch.float32, False),
        (torch.bfloat16, True),
    ):
        x = empty(B, M, V + odd, dtype=dtype)[..., int(odd) :]
        each = empty(B) if odd else None
        seeds = empty(B, dtype=torch.int64) if odd else None
        positions = empty(B, M, dtype=torch.int64) if odd else None
        common, both = arguments(
            x, x, (0.5, each), (1.0, each), keys_of(7, seeds, 0, None, positions, None),
            empty(B * M, 4, -(-V // CHUNK)), odd,
        )  # fmt: skip
        note = str(dtype).removeprefix("torch.") + " odd stride" * odd
        rows: dict[str, Any] = dict(streamed=2 * CHUNK * dtype.itemsize, aligned=not odd, note=note)
        yield StaticCall(
            mixed_chunks, ("chunks", table_of(arch)), dict(common, per=2), dtype, **rows
        )
        tokens, counts = empty(B, M, dtype=torch.int64), empty(B, dtype=torch.int32)
        given = dict(common, **decision(tokens, counts, not odd, both))
        rows["streamed"] //= CHUNK // CONFIGURATIONS[("prefix", table_of(arch))]["CHUNK"]
        yield StaticCall(accepted_prefix, ("prefix", table_of(arch)), given, dtype, **rows)
