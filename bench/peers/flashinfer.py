"""FlashInfer: paged prefill with a custom mask over the whole prefix, merging, chain speculative
sampling and its samplers. ``plan()``, which synchronises, is not timed, nor is making the mask."""

import functools
from collections.abc import Callable
from importlib import util
from typing import Any

import torch
from torch import Tensor

from . import Unsupported, dense

NAME = "FlashInfer"
WORKSPACE = 2**28  # bytes


def missing() -> str:
    if util.find_spec("flashinfer") is None:
        return "flashinfer is not installed"
    return "" if torch.cuda.is_available() else "it needs a CUDA device"


@functools.cache
def _workspace(device: torch.device) -> Tensor:
    """One for all plans, as engines do: calls follow each other on one stream."""
    return torch.empty(WORKSPACE, dtype=torch.uint8, device=device)


def tree(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, **kwargs: Any
) -> Callable[[], object]:
    """The rows' own K/V are put behind the context, in pages of their own, beforehand."""
    import flashinfer

    B, N, Hq, D = q.shape
    pages, page, Hkv, _ = k_cache.shape
    n = int(kwargs["cache_seqlens"][0])
    total = n + N
    need = -(-total // page)
    table, old = kwargs["block_table"].long(), kwargs["block_table"].shape[1]
    more = need - old
    fresh = pages + torch.arange(B * more, device=q.device).view(B, more)
    table = torch.cat([table, fresh], 1)
    pool = k_cache.new_zeros(pages + B * more, 2, page, Hkv, D)
    pool[:pages, 0], pool[:pages, 1] = k_cache, v_cache
    at = n + torch.arange(N, device=q.device)
    slots = table[:, at // page]
    pool[slots, 0, at % page], pool[slots, 1, at % page] = k, v
    count = torch.arange(B + 1, dtype=torch.int32, device=q.device)
    last = torch.full((B,), (total - 1) % page + 1, dtype=torch.int32, device=q.device)
    mask = dense.mask((q, k_cache, v_cache, k, v), kwargs)
    if mask is None:
        raise Unsupported("nothing is masked")
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(q.device), "NHD")
    wrapper.plan(
        *(count * N, count * need, table.flatten().int(), last, Hq, Hkv, D, page),
        custom_mask=mask.expand(B, 1, N, total).flatten(),
        q_data_type=q.dtype,
        kv_data_type=pool.dtype,
    )
    packed = q.reshape(B * N, Hq, D)
    return lambda: wrapper.run(packed, pool)


def merge(outs: Tensor, lses: Tensor, **kwargs: Any) -> Callable[[], object]:
    """Its layout and its base-2 lse are made beforehand."""
    import flashinfer

    M, B, N, H, D = outs.shape
    v = outs.permute(1, 2, 0, 3, 4).reshape(B * N, M, H, D).contiguous()
    s = (lses / torch.log(torch.tensor(2.0))).permute(1, 3, 0, 2).reshape(B * N, M, H).contiguous()
    return lambda: flashinfer.merge_states(v, s)


def chain(target: Tensor, tokens: Tensor, draft: Tensor, **kwargs: Any) -> Callable[[], object]:
    """From logits, as ours: both softmaxes are timed."""
    import flashinfer

    if kwargs["rule"] != "token":
        raise Unsupported("the token rule only")
    ids = tokens.int()

    def call() -> object:
        p, q = target.float().softmax(-1), draft.float().softmax(-1)
        return flashinfer.sampling.chain_speculative_sampling(q, ids, p)

    return call


def sample(logits: Tensor, **kwargs: Any) -> Callable[[], object]:
    """Tokens only: it gives no confidence."""
    import flashinfer

    temperature = kwargs.get("temperature", 0.0)
    if not temperature:
        raise Unsupported("no greedy sampler")
    if "top_k" in kwargs:
        k, p = kwargs["top_k"], kwargs["top_p"]
        sampler = flashinfer.sampling.top_k_top_p_sampling_from_logits
        return lambda: sampler(logits.float().div_(temperature), k, p)
    return lambda: flashinfer.sampling.sampling_from_logits(logits / temperature)


def branches(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, **kwargs: Any
) -> Callable[[], object]:
    """Cascade: the context as a shared level of pages of one key, each branch as a level of its
    own; the paged copies and ``plan()`` are made beforehand. Batch 1, one shared context."""
    import flashinfer

    B, K, L, Hq, D = q.shape
    if B != 1:
        raise Unsupported("one shared context: compared at batch 1 only")
    n, Hkv = k_cache.shape[1], k_cache.shape[2]
    keys = torch.cat([k_cache[0], k[0].flatten(0, 1)])
    values = torch.cat([v_cache[0], v[0].flatten(0, 1)])
    pool = torch.stack([keys, values], 1)[:, :, None]  # [pages, 2, 1, Hkv, D]: a page is one key
    device, i32 = q.device, torch.int32
    rows = torch.arange(K + 1, dtype=i32, device=device) * L
    ends = [torch.tensor([0, K * L], dtype=i32, device=device), rows]
    starts = [torch.tensor([0, n], dtype=i32, device=device), rows]
    pages = [
        torch.arange(n, dtype=i32, device=device),
        n + torch.arange(K * L, dtype=i32, device=device),
    ]
    last = [torch.ones(len(end) - 1, dtype=i32, device=device) for end in ends]
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, _workspace(device), "NHD")
    wrapper.plan(ends, starts, pages, last, Hq, Hkv, D, 1, causal=False, q_data_type=q.dtype)
    packed = q.reshape(K * L, Hq, D)
    return lambda: wrapper.run(packed, pool)


OPS = {
    "branch_attention": branches,
    "tree_attention": tree,
    "merge_states": merge,
    "rejection_sample": chain,
    "sample_and_score": sample,
}
