"""PyTorch eager: the formulas as a paper writes them, softmax and all, in the input's dtype."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import Prepare, Unsupported, dense

NAME = "eager"


def missing() -> str:
    return ""


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """q [B, Hq, N, D], k, v [B, Hkv, S, D], visible bool [B, 1, N, S]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(-1) @ v


def over_cache(*args: Any, **kwargs: Any) -> Callable[[], object]:
    """Dense K/V and mask are made beforehand."""
    q, (k, v) = dense.queries(args), dense.keys_and_values(args, kwargs)
    visible = dense.mask(args, kwargs)
    return lambda: attention(q, k, v, visible)


def branches(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, **kwargs: Any
) -> Callable[[], object]:
    """The context is copied for every branch beforehand, as batch expansion does."""
    B, K = q.shape[:2]
    keys, values = (
        torch.cat([c[:, None].expand(-1, K, -1, -1, -1), rows], 2).flatten(0, 1).transpose(1, 2)
        for c, rows in ((k_cache, k), (v_cache, v))
    )
    q, keys, values = q.flatten(0, 1).transpose(1, 2), keys.contiguous(), values.contiguous()
    return lambda: attention(q, keys, values, None).unflatten(0, (B, K))


def ranked(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Callable[[], object]:
    """The dense mask is made beforehand."""
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    if q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.element_size() > 2**33:
        raise Unsupported("its scores would take over 8 GB")
    visible = kwargs["k_rank"][:, None, None, :] <= kwargs["q_rank"][:, None, :, None]
    return lambda: attention(q, k, v, visible)


def merge(outs: Tensor, lses: Tensor, **kwargs: Any) -> Callable[[], object]:
    def call() -> tuple[Tensor, Tensor]:
        weight = lses.softmax(0).transpose(2, 3)[..., None]
        return (weight * outs).sum(0).to(outs.dtype), lses.logsumexp(0)

    return call


def sample(logits: Tensor, **kwargs: Any) -> Callable[[], object]:
    """Softmax, the sorts that filters need, multinomial, gather."""
    temperature, top_k = kwargs.get("temperature", 0.0), kwargs.get("top_k")
    top_p = kwargs.get("top_p")

    def call() -> tuple[Tensor, Tensor]:
        x = logits.float()
        confidence = x.softmax(-1)
        if not temperature:
            token = x.argmax(-1)
        else:
            x = x / temperature
            if top_k is not None:
                x = x.masked_fill(x < x.topk(top_k).values[:, -1:], -torch.inf)
            if top_p is not None:
                ordered, index = x.sort(-1, descending=True)
                p = ordered.softmax(-1)
                ordered = ordered.masked_fill(p.cumsum(-1) - p >= top_p, -torch.inf)
                x = torch.empty_like(x).scatter_(-1, index, ordered)
            token = x.softmax(-1).multinomial(1)[:, 0]
        return token, confidence.gather(-1, token[:, None])[:, 0]

    return call


def reject(target: Tensor, tokens: Tensor, draft: Tensor, **kwargs: Any) -> Callable[[], object]:
    """Two softmaxes in fp32, the test of each draft, a residual row, multinomial."""
    if kwargs["rule"] != "token":
        raise Unsupported("only the token rule")
    return lambda: reject_tokens(target, tokens, draft)


def reject_tokens(target: Tensor, tokens: Tensor, draft: Tensor) -> tuple[Tensor, Tensor]:
    p, q = target.float().softmax(-1), draft.float().softmax(-1)
    G = tokens.shape[1]
    p_x = p[:, :G].gather(-1, tokens[..., None])[..., 0]
    q_x = q.gather(-1, tokens[..., None])[..., 0]
    accepted = torch.rand_like(p_x) * q_x < p_x
    count = accepted.long().cumprod(-1).sum(-1)
    q = torch.cat([q, torch.zeros_like(q[:, :1])], 1)
    row = count[:, None, None].expand(-1, 1, p.shape[-1])
    residual = (p.gather(1, row) - q.gather(1, row))[:, 0].relu()
    return count, residual.multinomial(1)


def greedy_tree(tokens: Tensor, target: Tensor, **kwargs: Any) -> Callable[[], object]:
    """The argmax of all rows, then which nodes are right all the way up; no path, no last token."""
    parents, T = kwargs["parents"], tokens.shape[1]

    def call() -> Tensor:
        best = target.argmax(-1)
        right = best.gather(1, parents.clamp(min=0)) == tokens
        right[:, 0] = True
        up = parents.clamp(min=0)
        for _ in range(T.bit_length()):  # twice as far up each time
            right, up = right & right.gather(1, up), up.gather(1, up)
        return right

    return call


def commit_kv(
    k_caches: Tensor, v_caches: Tensor, path: Tensor, num_accepted: Tensor, **kwargs: Any
) -> Callable[[], object]:
    """An indexed copy a layer; which slots move where is worked out beforehand."""
    table, page = kwargs["block_table"].long(), k_caches.shape[2]
    n = int(num_accepted[0])
    start = kwargs["cache_seqlens"].long()[:, None]

    def slots(at: Tensor) -> tuple[Tensor, Tensor]:
        return table.gather(1, at // page), at % page

    source = slots(start + path[:, : n + 1].long())
    target = slots(start + torch.arange(n + 1, device=path.device))

    def call() -> None:
        for caches in (k_caches, v_caches):
            for cache in caches:
                cache[target] = cache[source]

    return call


def write_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, **kwargs: Any
) -> Callable[[], object]:
    """RoPE in fp32, then an indexed store; slots are worked out beforehand."""
    table, at, page = kwargs["block_table"].long(), kwargs["positions"], k_cache.shape[1]
    slots = (table.gather(1, at // page), at % page)
    cos, sin, q = kwargs["cos"][:, :, None], kwargs["sin"][:, :, None], kwargs["q"]

    def rotate(x: Tensor) -> Tensor:
        a, b = x.float().chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

    def call() -> Tensor:
        k_cache[slots], v_cache[slots] = rotate(k), v
        return rotate(q)

    return call


OPS: dict[str, Prepare] = {
    "branch_attention": branches,
    "commit_kv": commit_kv,
    "write_kv": write_kv,
    "tree_attention": over_cache,
    "block_attention": over_cache,
    "ranked_attention": ranked,
    "merge_states": merge,
    "sample_and_score": sample,
    "rejection_sample": reject,
    "verify_greedy": greedy_tree,
}
