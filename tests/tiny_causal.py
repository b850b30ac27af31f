"""Two tiny causal models for the loops: a transformer on our ops with a dense twin, and a table.

The transformer (2 layers, GQA, RoPE) decodes through tree_attention and write_kv; ``dense`` is the
same weights in plain PyTorch over the whole text. The table's law depends on the last two tokens,
which it reads back from the cache: a wrong commit_kv changes its law.
"""

import math

import torch
from torch import Tensor

import pydecode
from pydecode import trees
from pydecode.decode.cache import PagedCache


class TinyCausal:
    """A transformer with V = 24, d = 32, 4 query heads over 2 KV heads of 8."""

    V, d, layers, Hq, Hkv, D = 24, 32, 2, 4, 2, 8

    def __init__(self, seed: int, sharpness: float = 6.0) -> None:
        g = torch.Generator().manual_seed(seed)

        def w(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g) / math.sqrt(shape[-1])

        self.embedding = w(self.V, self.d) * 3
        self.head = w(self.V, self.d) * sharpness
        self.q = [w(self.Hq * self.D, self.d) for _ in range(self.layers)]
        self.kv = [w(2 * self.Hkv * self.D, self.d) for _ in range(self.layers)]
        self.o = [w(self.d, self.Hq * self.D) for _ in range(self.layers)]
        self.passes = 0

    def new_cache(self, batch: int, capacity: int) -> PagedCache:
        return PagedCache(self.layers, batch, capacity, self.Hkv, self.D, page_size=4, shuffle=True)

    def _rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angle = positions[..., None] / 100 ** (torch.arange(self.D // 2) / (self.D // 2))
        return angle.cos(), angle.sin()

    def _project(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = (x @ self.q[layer].T).unflatten(-1, (self.Hq, self.D))
        k, v = (x @ self.kv[layer].T).unflatten(-1, (2, self.Hkv, self.D)).unbind(-3)
        return q, k.contiguous(), v.contiguous()

    def __call__(self, tokens, positions, cache, mask, num_tokens=None, keep=None):  # type: ignore[no-untyped-def]
        self.passes += 1
        x = self.embedding[tokens]
        cos, sin = self._rope(positions.expand(tokens.shape))
        slots = cache.lengths[:, None] + torch.arange(tokens.shape[1])
        if num_tokens is not None:
            slots = torch.where(torch.arange(tokens.shape[1]) < num_tokens[:, None], slots, -1)
        for layer in range(self.layers):
            q, k, v = self._project(layer, x / x.norm(dim=-1, keepdim=True) * 4)
            k_cache, v_cache = cache.layer(layer)
            q = pydecode.write_kv(
                *(k, v, k_cache, v_cache),
                positions=slots,
                block_table=cache.block_table,
                cos=cos,
                sin=sin,
                q=q,
            )
            out = pydecode.tree_attention(
                *(q, k_cache, v_cache),
                mask=mask,
                cache_seqlens=cache.lengths,
                block_table=cache.block_table,
                num_tokens=num_tokens,
            )
            x = x + out.flatten(-2) @ self.o[layer].T
        if keep is not None:
            x = x[:, keep]
        return x @ self.head.T

    def dense(self, text: list[int]) -> Tensor:
        """Logits [S, V] of a whole text, without our ops."""
        x = self.embedding[torch.tensor(text)]
        cos, sin = self._rope(torch.arange(len(text)))

        def rotate(y: Tensor) -> Tensor:
            a, b = y[..., : self.D // 2], y[..., self.D // 2 :]
            c, s = cos[:, None], sin[:, None]
            return torch.cat([a * c - b * s, b * c + a * s], dim=-1)

        for layer in range(self.layers):
            q, k, v = self._project(layer, x / x.norm(dim=-1, keepdim=True) * 4)
            out = torch.nn.functional.scaled_dot_product_attention(
                *(y.transpose(0, 1)[None] for y in (rotate(q), rotate(k), v)),
                is_causal=True,
                enable_gqa=True,
            )
            x = x + out[0].transpose(0, 1).flatten(-2) @ self.o[layer].T
        return x @ self.head.T

    def greedy(self, prompt: list[int], count: int, stop: set[int] = frozenset()) -> list[int]:  # type: ignore[assignment]
        """Plain greedy decoding by whole forward passes."""
        text = list(prompt)
        for _ in range(count):
            text.append(int(self.dense(text)[-1].argmax()))
            if text[-1] in stop:
                break
        return text[len(prompt) :]


class TableModel:
    """p(next | the last two tokens) from a table; the cache holds token ids as K and V."""

    def __init__(self, seed: int, V: int = 3) -> None:
        g = torch.Generator().manual_seed(seed)
        self.V = V
        self.logits = torch.randn(V, V, V, generator=g, dtype=torch.float64)

    def new_cache(self, batch: int, capacity: int) -> PagedCache:
        return PagedCache(1, batch, capacity, 1, 1, page_size=4, dtype=torch.float64)

    def __call__(self, tokens, positions, cache, mask, num_tokens=None, keep=None):  # type: ignore[no-untyped-def]
        B, N = tokens.shape
        slots = cache.lengths[:, None] + torch.arange(N)
        if num_tokens is not None:
            slots = torch.where(torch.arange(N) < num_tokens[:, None], slots, -1)
        ids = tokens[:, :, None, None].double()
        k_cache, v_cache = cache.layer(0)
        pydecode.write_kv(
            *(ids, ids, k_cache, v_cache), positions=slots, block_table=cache.block_table
        )
        # the token before each row: its nearest visible row, else the end of the context
        if isinstance(mask, str):
            visible = torch.ones(1, N, N, dtype=torch.bool).tril()
        else:
            visible = trees.unpack_mask(mask, N)
        before = visible & ~torch.eye(N, dtype=torch.bool)
        parent = torch.where(before, torch.arange(N), -1).amax(-1).expand(B, N)
        at = (cache.lengths - 1).clamp(min=0)
        page = cache.block_table.long().gather(1, at[:, None] // 4)[:, 0]
        context_end = k_cache[page, at % 4, 0, 0].long()
        previous = tokens.gather(1, parent.clamp(min=0))
        previous = torch.where(parent < 0, context_end[:, None], previous)
        logits = self.logits[previous, tokens]
        return logits if keep is None else logits[:, keep]

    def law(self, prompt: list[int], depth: int) -> Tensor:
        """The exact joint law of the next ``depth`` tokens, [V] * depth."""
        p = self.logits.softmax(-1)
        joint, a, b = torch.ones((), dtype=torch.float64), prompt[-2], prompt[-1]
        joint = p[a, b]
        if depth > 1:
            joint = joint[:, None] * p[b]
        for _ in range(depth - 2):  # p(z | x, y) for the last two axes x, y
            joint = joint[..., None] * p
        return joint
