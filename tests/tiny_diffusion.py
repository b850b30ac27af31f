"""A tiny masked-diffusion model on pydecode's ops, and the same model and loops without them.

The twin is dense and slow on purpose: one request at a time, explicit masks, stale K/V by hand,
rules as Python loops over lists.
"""

import math
from typing import Any

import torch
from torch import Tensor

from pydecode import philox
from pydecode.decode.block_cache import BlockCache

V, DIM, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 32, 64, 4, 2, 16, 2
MASK = V - 1


class TinyDiffusion:
    """Two layers, d = 64, grouped heads, RoPE, random weights that attend sharply enough."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)

        def weight(*shape: int, gain: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=g) * gain / math.sqrt(shape[0])).to(dtype)

        self.dtype = dtype
        self.embedding = weight(V, DIM, gain=math.sqrt(V))
        self.layers = [
            dict(
                q=weight(DIM, HEADS * HEAD_DIM, gain=3.0),
                k=weight(DIM, KV_HEADS * HEAD_DIM, gain=3.0),
                v=weight(DIM, KV_HEADS * HEAD_DIM, gain=2.0),
                o=weight(HEADS * HEAD_DIM, DIM, gain=2.0),
                up=weight(DIM, 128),
                down=weight(128, DIM),
            )
            for _ in range(LAYERS)
        ]
        self.head = weight(DIM, V, gain=4.0)

    def kv(self, batch: int, slots: int) -> tuple[Tensor, Tensor]:
        """A fresh cache, full of NaN: what was never stored must never be seen."""
        shape = (LAYERS, batch, slots, KV_HEADS, HEAD_DIM)
        return tuple(torch.full(shape, torch.nan, dtype=self.dtype) for _ in "kv")

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: BlockCache,
        mask: Tensor | None,
        keep: slice | Tensor,
    ) -> Tensor:
        x = self.embedding[tokens]
        for i, w in enumerate(self.layers):
            h = norm(x)
            q = rotate((h @ w["q"]).unflatten(-1, (HEADS, HEAD_DIM)), positions)
            k = rotate((h @ w["k"]).unflatten(-1, (KV_HEADS, HEAD_DIM)), positions)
            v = (h @ w["v"]).unflatten(-1, (KV_HEADS, HEAD_DIM))
            x = x + cache.attend(i, q, k, v, mask).flatten(2) @ w["o"]
            x = x + torch.nn.functional.silu(norm(x) @ w["up"]) @ w["down"]
        return norm(x)[:, keep] @ self.head


def norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """RoPE by halves; x [B, N, H, D], positions [B, N]."""
    half = x.shape[-1] // 2
    angle = positions[..., None, None] * 10.0 ** (-torch.arange(half, device=x.device) / half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


# ---- the twin ------------------------------------------------------------------------------------

Past = list[tuple[Tensor, Tensor]]  # a layer: K, V [H, S, D], rotated, heads repeated


def dense(
    model: TinyDiffusion, tokens: Tensor, at: Tensor, sees: Tensor, past: Past | None = None
) -> tuple[Tensor, Past]:
    """Logits [N, V] of rows ``tokens`` [N] at positions ``at`` under bool ``sees`` [N, S + N]."""
    x, made = model.embedding[tokens], []
    for i, w in enumerate(model.layers):
        h = norm(x)
        q, k, v = (heads(h @ w[name], at, name != "v") for name in "qkv")
        made.append((k, v))
        if past is not None:
            k, v = torch.cat([past[i][0], k], 1), torch.cat([past[i][1], v], 1)
        s = torch.einsum("hnd,hsd->hns", q, k) / math.sqrt(HEAD_DIM)
        p = torch.softmax(s.masked_fill(~sees, -torch.inf), -1)
        x = x + torch.einsum("hns,hsd->nhd", p, v).flatten(1) @ w["o"]
        x = x + torch.nn.functional.silu(norm(x) @ w["up"]) @ w["down"]
    return norm(x) @ model.head, made


def heads(x: Tensor, at: Tensor, rotary: bool) -> Tensor:
    """[N, H D] -> [HEADS, N, D], rotated as complex numbers."""
    x = x.unflatten(-1, (-1, HEAD_DIM)).transpose(0, 1)
    x = x.repeat_interleave(HEADS // x.shape[0], dim=0)
    if not rotary:
        return x
    half = HEAD_DIM // 2
    turns = torch.polar(
        torch.ones(len(at), half, dtype=torch.float64),
        at[:, None].double() * 10.0 ** (-torch.arange(half) / half),
    )
    z = torch.complex(x[..., :half].double(), x[..., half:].double()) * turns
    return torch.cat([z.real, z.imag], -1).to(x.dtype)


class TwinPasses:
    """The logits [n, V] that fill positions [begin, stop), one request, one kind of cache."""

    def __init__(self, model: TinyDiffusion, kind: str, block_length: int, shift: int) -> None:
        self.model, self.kind, self.block_length, self.shift = model, kind, block_length, shift

    def __call__(self, x: list[int], start: int, begin: int, stop: int, fresh: bool) -> Tensor:
        tokens, at = torch.tensor(x), torch.arange(len(x))
        everyone = torch.ones(len(x), len(x), dtype=torch.bool)
        if self.kind == "block_causal":
            everyone = at[:, None] // self.block_length >= at // self.block_length
        early = max(start - self.shift, 0)
        if self.kind in ("none", "block_causal") or fresh:
            logits, self.made = dense(self.model, tokens, at, everyone)
        else:
            # the block (prefix: all that follows) is fresh, the rest as it was at the block's start
            end = stop if self.kind == "dual" else len(x)
            stale = [i for i in range(len(x)) if i < early or i >= end]
            past = [(k[:, stale], v[:, stale]) for k, v in self.made]
            rows = at[early:end]
            sees = torch.ones(len(rows), len(x), dtype=torch.bool)
            part, _ = dense(self.model, tokens[rows], rows, sees, past)
            logits = torch.full((len(x), V), torch.nan, dtype=part.dtype)
            logits[early:end] = part
        return torch.stack([logits[max(i - self.shift, 0)] for i in range(begin, stop)])


def twin_generate(
    model: TinyDiffusion,
    prompt: list[int],
    *,
    length: int,
    block_length: int,
    rule: str,
    kind: str = "none",
    shift: int = 0,
    steps_per_block: int | None = None,
    seed: int = 0,
    **given: Any,
) -> tuple[list[int], list[int], int]:
    """Greedy generation of one request: tokens, the step of each position, number of steps."""
    x, order, steps = prompt + [MASK] * length, [-1] * length, 0
    passes = TwinPasses(model, kind, block_length, shift)
    start = len(prompt) - (len(prompt) % block_length if kind == "block_causal" else 0)
    while start < len(x):
        begin, stop = max(start, len(prompt)), min(start + block_length, len(x))
        masks, i = sum(t == MASK for t in x[begin:stop]), 0
        while any(t == MASK for t in x[begin:stop]):
            logits = passes(x, start, begin, stop, fresh=i == 0)
            logits[:, MASK] = -torch.inf
            p = torch.softmax(logits, -1)
            c = {begin + j: float(p[j].max()) for j in range(stop - begin) if x[begin + j] == MASK}
            h = {j: -float(torch.special.xlogy(p[j - begin], p[j - begin]).sum()) for j in c}
            arguments = dict(given)
            if steps_per_block is not None:
                arguments["k"] = masks // steps_per_block + (i < masks % steps_per_block)
            if rule == "posterior":
                n = steps_per_block or stop - begin
                arguments["keep"] = (n - 1 - i) / (n - i)
                arguments["u"] = {j: posterior_uniform(seed, i, j) for j in c}
            for j in chosen(rule, c, h, **arguments):
                x[j] = int(p[j - begin].argmax())
                order[j - len(prompt)] = steps
            steps, i = steps + 1, i + 1
        start += block_length
    return x, order, steps


def posterior_uniform(seed: int, offset: int, position: int) -> float:
    words = (torch.tensor(n) for n in (seed, offset, position, 0))
    return float(philox.uniform(philox.COMMIT, *words))


def chosen(rule: str, c: dict[int, float], h: dict[int, float], **a: Any) -> list[int]:
    """Positions that a rule commits; c: confidences, h: entropies of the masked positions."""
    strict = a.get("strict", False)

    def over(value: float, threshold: float) -> bool:
        return value > threshold if strict else value >= threshold

    surest = sorted(c, key=lambda j: (-c[j], j))
    left_first = sorted(c)
    if rule == "top_k":
        ranked, n = surest, a.get("k", 1)
    elif rule == "threshold":
        slack = a.get("slack", 0.0)
        threshold = min(a["threshold"], c[surest[0]] - slack) if slack > 0 else a["threshold"]
        ranked, n = surest, sum(over(v, threshold) for v in c.values())
    elif rule == "factor":
        ranked, n = surest, 1
        while n < len(c) and c[surest[n]] >= 1 - a["factor"] / (n + 2):
            n += 1
    elif rule == "entropy":
        ranked = sorted(c, key=lambda j: (h[j], j))
        n = sum(v <= a["threshold"] for v in h.values())
    elif rule == "entropy_bound":
        ranked, n, total = sorted(c, key=lambda j: (h[j], j)), 0, 0.0
        while n < len(c) and total <= a["threshold"]:
            total, n = total + h[ranked[n]], n + 1
    elif rule == "prefix":
        ranked, n = left_first, 0
        while n < len(c) and over(c[left_first[n]], a["threshold"]):
            n += 1
    elif rule == "sequential":
        ranked, n = left_first, a["k"]
    elif rule == "segments":
        runs: list[list[int]] = []
        for j in left_first:
            if runs and runs[-1][-1] == j - 1:
                runs[-1].append(j)
            else:
                runs.append([j])
        best = {min(run, key=lambda j: (-c[j], j)) for run in runs}
        take = {j for j in best if c[j] > a["low"]} | {j for j in c if c[j] > a["threshold"]}
        ranked, n = sorted(take, key=surest.index) + [j for j in surest if j not in take], len(take)
    elif rule == "posterior":
        return [j for j in c if a["u"][j] >= a["keep"]]
    elif rule == "external":
        score = {j: a["score"](c[j], h[j], j) for j in c}
        ranked = sorted(c, key=lambda j: (-score[j], j))
        n = sum(v > a["threshold"] for v in score.values())
    n = max(n, a.get("min_commit", 1))
    return ranked[: min(n, a.get("max_commit", n))]
