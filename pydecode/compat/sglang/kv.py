"""Keeping an accepted path's K/V in SGLang's token pools: slots are pages of one token."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

import pydecode

from ...reference.commit_kv import MAX_ROWS


def move_accept_tokens_to_target_kvcache(
    batch: Any,
    accept_index: Tensor,
    num_correct_drafts: Tensor,
    token_to_kv_pool_allocator: Any,
) -> None:
    """Moves the accepted nodes' K/V to the front: ``sglang.srt.speculative.spec_utils``'s function.

    ``commit_accepted_kv`` on the allocator's pool: all layers in one call, nothing is read back.

    Args:
        batch: its ``out_cache_loc`` [bs * ndt] is read, the slots that this forward wrote (theirs
            finds the same ones again through req_to_token and seq_lens).
        accept_index: int32 [bs, S], as verification left it.
        num_correct_drafts: int32 [bs], accepted nodes without the root.
        token_to_kv_pool_allocator: its ``get_kvcache()`` is a MHATokenToKVPool, a MLATokenToKVPool
            (a latent row moves as a whole), or a SWAKVPool of these.

    Raises:
        NotImplementedError: another pool; it may hold more than K and V (scales, an index), so its
            buffers have to be named: ``commit_accepted_kv``.
    """
    pool = token_to_kv_pool_allocator.get_kvcache()
    _commit_pool(pool, batch.out_cache_loc, accept_index, num_correct_drafts)


def commit_accepted_kv(
    k_buffer: Sequence[Tensor] | Tensor,
    v_buffer: Sequence[Tensor] | Tensor,
    out_cache_loc: Tensor,
    accept_index: Tensor,
    num_correct_drafts: Tensor,
) -> None:
    """Moves the accepted nodes' rows to the first slots of their request, all layers in one call.

    ``k[loc[b, j]] = k[loc[b, accept_index[b, j] - b * ndt]]`` for j = 0 .. num_correct_drafts[b],
    with loc = out_cache_loc as [bs, ndt], all rows read before any is written. Slots at
    ``loc[b, num_correct_drafts[b] + 1 :]`` are free afterwards.

    Args:
        k_buffer, v_buffer: **mutated**, a tensor a layer [slots, Hkv, D], or one [layers, slots,
            Hkv, D]; floats, fp8, or the uint8 that SGLang stores fp8 as.
        out_cache_loc: int [bs * ndt], the slots of the nodes.
        accept_index: int [bs, S], b * ndt + node, root first.
        num_correct_drafts: int [bs], accepted nodes without the root.

    A request whose nodes do not start at its root and ascend (an undecided one, or rows that are
    not its own) keeps its cache. EAGLE's and n-gram trees number parents before children.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit, by name.
    """
    bs = accept_index.shape[0]
    if out_cache_loc.dim() != 1 or (bs and out_cache_loc.shape[0] % bs):
        got = list(out_cache_loc.shape)
        raise ValueError(f"out_cache_loc: expected [bs * ndt] slots with bs = {bs}, got {got}")
    ndt = out_cache_loc.shape[0] // max(bs, 1)
    first = torch.arange(0, bs * ndt, max(ndt, 1), device=accept_index.device)[:, None]
    pydecode.commit_kv(
        _pages("k_buffer", k_buffer),
        _pages("v_buffer", v_buffer),
        accept_index - first,
        num_correct_drafts,
        cache_seqlens=0,
        block_table=out_cache_loc.view(bs, ndt),
    )


def get_src_tgt_cache_loc(
    seq_lens: Tensor,
    out_cache_loc: Tensor,
    accept_index: Tensor,
    num_correct_drafts: Tensor,
    draft_token_num: int,
    page_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Where accepted K/V lie, where they belong, and how many slots to free.

    SGLang's function, one step on: theirs takes the accepted rows compacted, which reads a count
    back from the device, and returns tgt_cache_loc empty, for the kernel ``get_target_cache_loc``
    to fill. Ours takes them padded as well, and fills it.

    Args:
        seq_lens: int [bs], lengths before this forward.
        out_cache_loc: int [bs * ndt], the nodes' slots.
        accept_index: int [bs, S] with -1 after the path, or compacted [sum of num + 1].
        num_correct_drafts: int [bs], accepted nodes without the root.
        draft_token_num: ndt. page_size: pages are freed as a whole.

    Returns:
        src_cache_loc, tgt_cache_loc: accept_index's shape, out_cache_loc's dtype; 0, SGLang's
        padding slot, in both where accept_index is -1 or not a row. to_free_num_slots [bs]:
        the last so many of each request's ndt slots are whole free pages.
    """
    size = out_cache_loc.shape[0]
    if accept_index.dim() == 2:
        bs, S = accept_index.shape
        j = torch.arange(S, device=accept_index.device)
        target = (
            j + torch.arange(0, bs * draft_token_num, draft_token_num, device=j.device)[:, None]
        )
        there = (j <= num_correct_drafts[:, None]) & (j < draft_token_num)
    else:
        i = torch.arange(accept_index.shape[0], device=accept_index.device)
        end = (num_correct_drafts + 1).cumsum(0)
        b = torch.searchsorted(end, i, right=True).clamp(max=max(end.shape[0] - 1, 0))
        j = i - (end - num_correct_drafts - 1)[b]
        target = b * draft_token_num + j
        there = (j >= 0) & (j < draft_token_num)
    there = there & (accept_index >= 0) & (accept_index < size) & (target < size)
    locs = pad(out_cache_loc, (0, 1))  # the entry more is the padding slot
    src = locs[torch.where(there, accept_index, size)]
    tgt = locs[torch.where(there, target, size)]

    end_of_nodes = seq_lens + draft_token_num
    last_page = (seq_lens + num_correct_drafts + page_size) // page_size * page_size
    return src, tgt, end_of_nodes - torch.minimum(last_page, end_of_nodes)


def move_kv_cache_native(
    k_buffer: Sequence[Tensor] | Tensor,
    v_buffer: Sequence[Tensor] | Tensor,
    tgt_loc: Tensor,
    src_loc: Tensor,
) -> None:
    """``k[tgt_loc] = k[src_loc]`` in every layer: SGLang's ``move_kv_cache_native``, and the pools'
    method ``move_kv_cache(tgt_loc, src_loc)``, in one call, all rows read before any is written.

    Args:
        k_buffer, v_buffer: **mutated**, as in ``commit_accepted_kv``.
        tgt_loc, src_loc: int, any equal shapes, at most 511 slots; equal targets must have equal
            sources. A slot outside the pool is not moved.

    ``move_accept_tokens_to_target_kvcache`` has no such limit, since it knows requests apart.

    Raises:
        ValueError, TypeError: too many slots, or a shape or dtype that does not fit, by name.
    """
    n = tgt_loc.numel()
    if 2 * n + 1 > MAX_ROWS:
        raise ValueError(
            f"tgt_loc: expected at most {(MAX_ROWS - 1) // 2} slots, got {n}; "
            "move_accept_tokens_to_target_kvcache takes any number"
        )
    # as one request: a root, which stays where it is, where the rows go, where they lie
    table = pad(torch.cat([tgt_loc.flatten(), src_loc.flatten()]), (1, 0))
    path = pad(torch.arange(n + 1, 2 * n + 1, device=table.device), (1, 0))
    num = torch.full((1,), n, device=table.device)
    pages = _pages("k_buffer", k_buffer), _pages("v_buffer", v_buffer)
    pydecode.commit_kv(*pages, path[None], num, cache_seqlens=0, block_table=table[None])


def _commit_pool(
    pool: Any, out_cache_loc: Tensor, accept_index: Tensor, num_correct_drafts: Tensor
) -> None:
    kind = type(pool).__name__
    if kind == "MHATokenToKVPool":
        k_buffer, v_buffer = pool.k_buffer, pool.v_buffer
    elif kind == "MLATokenToKVPool":
        # one row a token, which moves in two parts
        half = pool.kv_buffer[0].shape[-1] // 2
        k_buffer = [x[..., :half] for x in pool.kv_buffer]
        v_buffer = [x[..., half:] for x in pool.kv_buffer]
    elif kind == "SWAKVPool":
        swa_loc = pool.translate_loc_from_full_to_swa(out_cache_loc)
        _commit_pool(pool.swa_kv_pool, swa_loc, accept_index, num_correct_drafts)
        return _commit_pool(pool.full_kv_pool, out_cache_loc, accept_index, num_correct_drafts)
    else:
        raise NotImplementedError(
            f"token_to_kv_pool_allocator: expected a pool of MHATokenToKVPool, MLATokenToKVPool or "
            f"SWAKVPool, got {kind}; call commit_accepted_kv with each of its buffers"
        )
    return commit_accepted_kv(k_buffer, v_buffer, out_cache_loc, accept_index, num_correct_drafts)


def _pages(name: str, buffer: Sequence[Tensor] | Tensor) -> list[Tensor] | Tensor:
    """[slots, Hkv, D] a layer as pages of one token, [slots, 1, Hkv, D]; no copy."""
    if isinstance(buffer, Tensor):
        if buffer.dim() != 4:
            got = list(buffer.shape)
            raise ValueError(f"{name}: expected [layers, slots, Hkv, D], got {got}")
        return _bits(buffer).unsqueeze(2)
    for x in buffer:
        if x.dim() != 3:
            raise ValueError(f"{name}: expected [slots, Hkv, D] a layer, got {list(x.shape)}")
    return [_bits(x).unsqueeze(1) for x in buffer]


def _bits(x: Tensor) -> Tensor:
    """SGLang keeps fp8 as uint8; rows move bit by bit, whichever fp8 it is."""
    return x.view(torch.float8_e4m3fn) if x.dtype == torch.uint8 else x
