"""The forward passes of masked-diffusion decoding: which rows are fed, seen and stored.

Four kinds of cache, with the canvas [0, T) and the block [s, e):

| kind | a block's first pass | its later passes | K/V that they see |
|---|---|---|---|
| none (LLaDA) | [0, T) | [0, T) | fresh everywhere |
| prefix (Fast-dLLM) | [0, T), stores [0, s) | [s, T) | of [0, s) as stored |
| dual (Fast-dLLM) | [0, T), stores [0, T) | [s, e) | of [0, s) and [e, T) as stored |
| block_causal (BD3-LM, SDAR) | [previous s, e), stores up to s | [s, e) | of [0, s), exact |

Prefix and dual approximate: the stored K/V were computed while the block was still masked. A model
trained block-causally never lets a token see a later block, so there the cache is exact; its first
pass also stores the block before, which is clean by then, so no pass is spent on storing alone.
With ``shift=1`` position i's token comes from row i - 1, so every pass starts one row earlier.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pydecode.ranks import PAD
from pydecode.validation import (
    expect_choice,
    expect_dim,
    expect_dtype,
    expect_index,
    expect_tensor,
)

from .block_cache import BlockCache

KINDS = ("none", "prefix", "dual", "block_causal")


class Block(NamedTuple):
    start: int  # where the block begins
    begin: int  # its first generated position: a block-causal block may begin inside the prompt
    stop: int


class Passes:
    """Feeds the model, pass by pass, the rows that a kind of cache asks for."""

    def __init__(
        self,
        model: Callable[..., Tensor],
        kind: str,
        kv: tuple[Tensor, Tensor] | None,
        positions: Tensor,
        first: Tensor | None,
        prompt: int,
        block_length: int,
        shift: int,
    ) -> None:
        self.model, self.kind, self.kv, self.positions = model, kind, kv, positions
        self.first, self.prompt, self.block_length, self.shift = first, prompt, block_length, shift
        self.stored = 0  # block_causal: slots that hold final K/V
        self.count = 0

    def blocks(self) -> list[Block]:
        """Blocks of the generated part; block-causal ones lie on multiples of block_length."""
        prompt, total, size = self.prompt, self.positions.shape[1], self.block_length
        start = prompt // size * size if self.kind == "block_causal" else prompt
        cuts = range(start, total, size)
        return [Block(s, max(s, prompt), min(s + size, total)) for s in cuts]

    def __call__(self, tokens: Tensor, block: Block, fresh: bool) -> Tensor:
        """Logits [B, length + shift, V] of the generated positions of ``block``."""
        total = tokens.shape[1]
        earlier = max(block.start - self.shift, 0)
        # rows [start, stop), which see cached slots [0, context) and store themselves below `store`
        if self.kind == "none":
            start, stop, context, store = 0, total, 0, 0
        elif self.kind == "block_causal" and self.kv is None:
            start, stop, context, store = 0, block.stop, 0, 0
        elif self.kind == "block_causal":
            start = self.stored if fresh else earlier
            stop, context, store = block.stop, start, block.start if fresh else 0
            self.stored = block.start
        elif fresh:
            start, stop, context, store = 0, total, 0, total if self.kind == "dual" else earlier
        elif self.kind == "prefix":
            start, stop, context, store = earlier, total, earlier, 0
        else:
            start, stop, context, store = earlier, block.stop, total, 0
        k, v = self.kv or (None, None)
        return self._run(
            tokens[:, start:stop],
            self.positions[:, start:stop],
            BlockCache(k, v, start, context, store, self.first),
            self._ranks(start, stop),
            slice(max(block.begin - self.shift, 0) - start, block.stop - start),
        )

    def branches(self, tokens: Tensor, states: Tensor, block: Block) -> Tensor:
        """Logits [B, K, L, V] of the generated positions under K candidate states [B, K, L]."""
        B, K, L = states.shape
        earlier = max(block.start - self.shift, 0)
        start = 0 if self.kind == "none" or self.kv is None else earlier
        stop = tokens.shape[1] if self.kind in ("none", "prefix") else block.stop
        rows = tokens[:, None, start:stop].repeat(1, K, 1)
        rows[:, :, block.begin - start : block.stop - start] = states
        k, v = self.kv or (None, None)
        context = tokens.shape[1] if self.kind == "dual" else start
        ranks = self._ranks(start, stop)
        if ranks is not None and context > 0:
            raise ValueError(
                f"shift: expected 0 for branches over a block_causal cache, got {self.shift}"
            )
        begin = max(block.begin - self.shift, 0) - start
        keep = torch.arange(begin, begin + L, device=tokens.device)
        keep = (keep + torch.arange(K, device=tokens.device)[:, None] * (stop - start)).flatten()
        logits = self._run(
            rows.flatten(1),
            self.positions[:, None, start:stop].expand(B, K, -1).flatten(1),
            BlockCache(k, v, start, context, 0, self.first, branches=K),
            ranks,
            keep,
        )
        return logits.unflatten(1, (K, L))

    def _run(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: BlockCache,
        ranks: Tensor | None,
        keep: slice | Tensor,
    ) -> Tensor:
        self.count += 1
        logits = self.model(tokens, positions, cache, ranks, keep=keep)
        wanted = keep.stop - keep.start if isinstance(keep, slice) else keep.shape[0]
        if logits.dim() != 3 or logits.shape[1] not in (tokens.shape[1], wanted):
            raise ValueError(
                f"model: expected logits [B, N or kept rows, V] = [{tokens.shape[0]}, "
                f"{tokens.shape[1]} or {wanted}, V], got {list(logits.shape)}"
            )
        return logits if logits.shape[1] == wanted else logits[:, keep]

    def _ranks(self, start: int, stop: int) -> Tensor | None:
        """Who sees whom among rows [start, stop): None where all see each other."""
        at = torch.arange(start, stop, dtype=torch.int32, device=self.positions.device)[None]
        size = self.block_length
        causal = self.kind == "block_causal" and start // size != (stop - 1) // size
        padded = self.first is not None and start < self.prompt - 1  # the last one is a token
        if not (causal or padded):
            return None
        ranks = at // size if causal else torch.zeros_like(at)
        if padded:
            assert self.first is not None
            ranks = torch.where(at < self.first[:, None], PAD, ranks)
        return ranks


def prepare(
    model: Callable[..., Tensor],
    prompt: Tensor,
    length: int,
    block_length: int,
    mask_id: int,
    cache: str,
    kv: tuple[Tensor, Tensor] | None,
    shift: int,
    prompt_lengths: Tensor | None,
) -> Passes:
    """Checks what the loops share; positions count from the first valid token of the prompt."""
    expect_tensor("prompt", prompt)
    expect_dim("prompt", prompt, 2, "[B, P]")
    expect_dtype("prompt", prompt, (torch.int64,))
    for name, value, least in (
        *(("length", length, 0), ("block_length", block_length, 1), ("mask_id", mask_id, 0)),
        ("shift", shift, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    if shift > 1:
        raise ValueError(f"shift: expected 0 or 1, got {shift}")
    expect_choice("cache", cache, KINDS)
    B, P = prompt.shape
    if cache == "none" and kv is not None:
        raise ValueError('kv: expected None with cache="none", got tensors')
    if cache in ("prefix", "dual") and kv is None:
        raise ValueError(f'kv: expected (K, V) with cache="{cache}", got None')
    for name, x in zip(("K", "V"), kv or ()):
        expect_dim(f"kv: {name}", x, 5, "[layers, B, S, Hkv, D]")
        if x.shape[1] != B or x.shape[2] < P + length:
            raise ValueError(
                f"kv: expected {name} [layers, B = {B}, S >= P + length = {P + length}, Hkv, D], "
                f"got shape {list(x.shape)}"
            )
    positions, first = torch.arange(P + length, device=prompt.device).expand(B, -1), None
    if prompt_lengths is not None:
        lengths = expect_index("prompt_lengths", prompt_lengths, (B,), "[B]", prompt.device)
        first = P - lengths.long()
        blocks = block_length if cache == "block_causal" else 1
        if bool(((first < 0) | (first >= P) | (first % blocks != 0)).any()):
            unit = "" if blocks == 1 else f", P less whole blocks of {blocks}"
            raise ValueError(
                f"prompt_lengths: expected lengths in [1, P = {P}]{unit}, got {lengths.tolist()}"
            )
        positions = (positions - first[:, None]).clamp(min=0)
    return Passes(model, cache, kv, positions, first, P, block_length, shift)
