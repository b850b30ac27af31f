"""Tree attention in the form of vLLM's TREE_ATTN backend, which vLLM removed (#42121)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import pydecode
from pydecode import trees
from pydecode.validation import FP8, checking

MAX_TREE_ROWS = 1024  # rows in flight of pydecode.tree_attention


def unified_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    seqused_k: Tensor,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: Sequence[int],
    block_table: Tensor,
    softcap: float,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    seq_threshold_3D: int | None = None,
    num_par_softmax_segments: int | None = None,
    softmax_segm_output: Tensor | None = None,
    softmax_segm_max: Tensor | None = None,
    softmax_segm_expsum: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    output_scale: Tensor | None = None,
    qq_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    mm_prefix_range: Tensor | None = None,
    use_alibi_sqrt: bool = False,
) -> None:
    """Attention of a packed batch over a paged cache that already has the rows' keys and values.

    Replaces ``unified_attention`` of vLLM's ``triton_unified_attention.py`` (as of February 2026,
    while TREE_ATTN called it) on ``pydecode.tree_attention``, and, for long causal chunks, on
    ``pydecode.ranked_attention``.

    Args:
        q: [total, Hq, D], fp16, bf16 or fp32, any head dim. k, v: [pages, page, Hkv, D], any page
            size, q's dtype or fp8.
        out: [total, Hq, D], written.
        cu_seqlens_q: [B+1]. max_seqlen_q: the longest, an int. seqused_k: [B], lengths with the
            rows in flight. max_seqlen_k: an int, their upper bound. block_table: [B, max_pages].
        causal: True.
        window_size: (left, right); left -1: none, else a row sees left + 1 keys, itself included.
            The right side is what causality leaves.
        k_descale, v_descale: numbers or fp32 of one entry, [Hkv] or [B, Hkv]; read for an fp8 cache
            only, as in theirs.
        qq_bias: [n, n], one tree for the batch, or (ours) [B, n, n], a tree a request, n >=
            max_seqlen_q: entry (i, j) is 0 where row i sees row j and -inf elsewhere. It hides,
            and never shows what causality hides. Or (ours) what ``pack_qq_bias`` made of it, so
            that the layers of a forward pass convert it once. Up to 1024 rows a request. None, or
            empty: plain causal, any number of rows.
        sinks: [Hq], a logit a head in the denominator.
        seq_threshold_3D, num_par_softmax_segments, softmax_segm_output, softmax_segm_max,
        softmax_segm_expsum: their kernel's scratch and knobs, without effect.

    Where it differs:
        With a tree, the window counts depth (a node at depth d is at position context + d), where
        theirs counts slots, which cuts context that the committed text would see. All of k_descale
        is read, not its first entry. Rows of q past cu_seqlens_q[B] become 0.

    Raises:
        NotImplementedError: causal=False, q_descale, alibi_slopes, use_alibi_sqrt, output_scale,
            mm_prefix_range.
        ValueError, TypeError: a tensor that does not fit, by name; under ``pydecode.checks(True)``
            also an entry of qq_bias that is neither 0 nor -inf.

    >>> import torch
    >>> q, cache = torch.randn(3, 4, 8), torch.randn(2, 16, 2, 8)
    >>> bias, out = prepare_tree_attn_bias([(0,), (1,)]), torch.empty_like(q)
    >>> unified_attention(
    ...     q, cache, cache, out, torch.tensor([0, 3]), 3, torch.tensor([20]), 20, 0.35, True,
    ...     (-1, -1), torch.tensor([[1, 0]]), 0.0, None, None, None, qq_bias=bias,
    ... )
    >>> out.isfinite().all()
    tensor(True)
    """
    if not causal:
        raise NotImplementedError("causal: expected True; block_attention is bidirectional")
    if use_alibi_sqrt or not (q_descale is alibi_slopes is output_scale is mm_prefix_range is None):
        _refuse(
            q_descale=q_descale,
            alibi_slopes=alibi_slopes,
            output_scale=output_scale,
            mm_prefix_range=mm_prefix_range,
            use_alibi_sqrt=use_alibi_sqrt or None,
        )
    window = window_size[0] + 1 if window_size[0] >= 0 else None
    scaled = k.dtype in FP8 or v.dtype in FP8
    shared: dict[str, Any] = dict(
        block_table=block_table,
        softmax_scale=softmax_scale,
        softcap=softcap,
        window_size=window,
        sinks=sinks,
        k_scale=_scale(k_descale) if scaled else None,
        v_scale=_scale(v_descale) if scaled else None,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        out=out,
    )
    tree = qq_bias is not None and qq_bias.numel() > 0
    # among rows in flight tree_attention does not count the window, and it takes so many of them
    most = MAX_TREE_ROWS if window is None else min(MAX_TREE_ROWS, window)
    if not tree and max_seqlen_q > most:
        request, row = _places(cu_seqlens_q, q.shape[0])
        rank = (seqused_k - cu_seqlens_q[1:])[request] + row
        keys = min(max_seqlen_k, block_table.shape[1] * k.shape[1])
        pydecode.ranked_attention(
            q,
            k,
            v,
            q_rank=rank.int(),
            k_rank=torch.arange(keys, dtype=torch.int32, device=q.device)[None],
            cache_seqlens=seqused_k,
            **shared,
        )
        return
    mask: Tensor | str = "causal"
    if tree:
        assert qq_bias is not None
        mask = qq_bias
        if mask.is_floating_point():
            mask = pack_qq_bias(mask, cu_seqlens_q, max_seqlen_q, q.shape[0], window_size)
    context = seqused_k - cu_seqlens_q.diff()
    pydecode.tree_attention(q, k, v, mask=mask, cache_seqlens=context, **shared)


def pack_qq_bias(
    qq_bias: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    total: int,
    window_size: Sequence[int] = (-1, -1),
) -> Tensor:
    """``unified_attention``'s qq_bias as the operator's bits; once a step, for all its layers.

    Ours, there is none in vLLM. ``total`` is q's first dimension, ``window_size`` that of the
    layers; the rest is as there.

    Returns:
        int64 [total, ceil(max_seqlen_q / 64)], bit j of row i: i sees the request's row j.

    Raises:
        ValueError: a bias that is not [n, n] or [B, n, n] with n >= max_seqlen_q; under
            ``pydecode.checks(True)`` an entry that is neither 0 nor -inf.

    >>> import torch
    >>> bias = prepare_tree_attn_bias([(0,), (1,), (1, 0)])
    >>> pack_qq_bias(bias, torch.tensor([0, 4, 6]), 4, 6).flatten()
    tensor([ 1,  3,  5, 13,  1,  3])
    """
    B, N = cu_seqlens_q.shape[0] - 1, max_seqlen_q
    shape = tuple(qq_bias.shape)
    if not (len(shape) == 2 or (len(shape) == 3 and shape[0] == B)) or min(shape[-2:]) < N:
        raise ValueError(
            f"qq_bias: expected [n, n] or [B, n, n] with B = {B}, n >= max_seqlen_q = {N}, "
            f"got {list(shape)}"
        )
    bias = qq_bias[..., :N, :N]
    if checking():
        odd = ((bias != 0) & (bias != -torch.inf)).nonzero()
        if odd.numel():
            at = odd[0].tolist()
            raise ValueError(f"qq_bias: expected 0 or -inf, got {bias[tuple(at)]} at index {at}")
    sees = (bias == 0).tril()
    window = window_size[0] + 1
    if 0 < window < N:  # by depth; beyond it a node sees no context either
        depth = sees.sum(-1)
        sees = sees & (depth[..., :, None] - depth[..., None, :] < window)
    packed = trees.pack_mask(sees)
    request, row = _places(cu_seqlens_q, total)
    row = (row - cu_seqlens_q[request]).clamp(0, N - 1)
    return packed[row] if len(shape) == 2 else packed[request, row]


def prepare_tree_attn_bias(
    sorted_tree_choices: Sequence[Sequence[int]],
    depth_counts: Sequence[int] | None = None,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | None = None,
) -> Tensor:
    """The qq_bias [T, T] of a tree that is written as paths: 0 for itself and its ancestors.

    Replaces ``_prepare_tree_attn_bias`` of vLLM's ``tree_attn.py`` (of which
    ``speculative_token_tree`` is the text) on ``pydecode.trees.from_choices``. Row 0 is the root,
    row i + 1 is choice i. ``depth_counts`` follows from the choices and may be left out.

    Raises:
        ValueError: choices that are not sorted by length, then lexicographically (theirs makes a
            wrong mask of them); a duplicate or a missing prefix; other depth_counts.

    >>> prepare_tree_attn_bias([(0,), (1,)])
    tensor([[0., -inf, -inf],
            [0., 0., -inf],
            [0., -inf, 0.]])
    """
    choices = [tuple(choice) for choice in sorted_tree_choices]
    if choices != sorted(choices, key=lambda choice: (len(choice), choice)):
        raise ValueError(f"sorted_tree_choices: expected by length, then in order, got {choices}")
    tree = trees.from_choices(choices)
    counts = torch.bincount(tree.depths[0])[1:].tolist()
    if depth_counts is not None and list(depth_counts) != counts:
        raise ValueError(f"depth_counts: expected {counts}, got {list(depth_counts)}")
    sees = trees.unpack_mask(tree.mask[0], len(choices) + 1)
    return torch.where(sees, 0.0, -torch.inf).to(device, dtype or torch.get_default_dtype())


_prepare_tree_attn_bias = prepare_tree_attn_bias


def _refuse(**given: Any) -> None:
    name = next(name for name, x in given.items() if x is not None)
    raise NotImplementedError(f"{name}: expected none, it is not supported")


def _places(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Of each packed row: its request (the last one for rows past the end), and its index."""
    row = torch.arange(total, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    request = torch.searchsorted(cu_seqlens[1:], row, right=True)
    return request.clamp(max=cu_seqlens.shape[0] - 2), row


def _scale(x: Tensor | float | None) -> Tensor | float | None:
    """One entry counts for all heads."""
    return x.reshape(()) if isinstance(x, Tensor) and x.numel() == 1 else x
