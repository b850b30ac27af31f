"""Masks from transformers to ``ranked_attention``: made once a forward pass, read in each layer.

transformers calls the function that is registered for the attention implementation. Ours gives
*ranks* where they say it all (causal or bidirectional, padded anywhere, static caches): one row of
N + S numbers a request, where SDPA's mask has N rows of S. All else (windows that cut, packed
sequences, blocks, whatever a model adds) is SDPA's own bool mask. Nothing here synchronises.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pydecode import ranks

from ...validation import checking

HIDDEN = -9000.0  # what an additive mask hides has this or less: -1e4, -1e9, the dtype's least


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor:
    """A mask function of transformers' ``AttentionMaskInterface``, with ``sdpa_mask``'s arguments.

    Where ``sdpa_mask`` may leave the mask out once it has read that nothing is padded, this one
    reads nothing: it gives ranks, int32 [B|1, 1, 1, N + S], the queries' before the keys', with
    ``ranks.PAD`` for padded keys. Where a mask must be a mask (the model will change it, or
    a window cuts) it is ``sdpa_mask``'s, bool [B, 1, N, S].
    """
    if not (allow_is_causal_skip or allow_is_bidirectional_skip) or (
        local_size is not None and kv_length >= local_size
    ):
        from transformers.masking_utils import sdpa_mask

        if mask_function is not None:
            options["mask_function"] = mask_function
        made: Any = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # type: ignore[arg-type]
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            device=device,
            **options,
        )
        return made
    if allow_is_causal_skip:  # a rank is a place in the text
        q = torch.arange(q_length, dtype=torch.int32, device=device) + q_offset
        k = torch.arange(kv_length, dtype=torch.int32, device=device) + kv_offset
    else:
        q = torch.zeros(q_length, dtype=torch.int32, device=device)
        k = torch.zeros(kv_length, dtype=torch.int32, device=device)
    q, k = q[None], k[None]
    if attention_mask is not None:
        real = attention_mask[:, kv_offset : kv_offset + kv_length]
        # a static cache is longer than the text so far
        real = torch.nn.functional.pad(real.to(torch.int32), (0, kv_length - real.shape[1]))
        k = torch.where(real != 0, k, ranks.PAD)
        q = q.expand(k.shape[0], q_length)
    both = torch.cat([q, k], dim=1).to(torch.int32)
    mask = both[:, None, None]
    if not torch.compiler.is_compiling():  # what each layer takes, made once
        mask._pydecode = both.split((q_length, kv_length), dim=1)  # type: ignore[attr-defined]
    return mask


def read_mask(
    mask: Tensor, B: int, N: int, S: int, module: nn.Module
) -> tuple[dict[str, Any], Tensor | None]:
    """``ranked_attention``'s arguments for a mask, and what is to be added to its result (or None).

    mask: ``make_mask``'s ranks; or bool, or floats that are added to the scores, [B|1, 1, N|1, S].
    """
    shape = tuple(mask.shape)
    if mask.dtype == torch.int32:
        if shape not in ((B, 1, 1, N + S), (1, 1, 1, N + S)):
            raise ValueError(f"attention_mask: expected ranks [B|1, 1, 1, {N + S}], got {shape}")
        parts = None if torch.compiler.is_compiling() else getattr(mask, "_pydecode", None)
        if parts is None or parts[1].shape[1] != S:
            parts = mask.flatten(0, 2).split((N, S), dim=1)
        return dict(q_rank=parts[0], k_rank=parts[1]), None
    if len(shape) != 4 or shape[1] != 1:
        raise NotImplementedError(
            f"attention_mask: expected [B|1, 1, {N}, {S}], the same for all heads, got {shape}"
        )
    if shape[0] not in (1, B) or shape[2] not in (1, N) or shape[3] != S:
        raise ValueError(f"attention_mask: expected [B|1, 1, {N}, {S}], got {shape}")
    poison = None
    if mask.dtype != torch.bool:
        mask, poison = _from_additive(mask, getattr(module, "layer_idx", None))
    visible = mask.squeeze(1)
    if visible.stride(-1) != 1 and S > 1:
        visible = visible.contiguous()
    return dict(mask=visible if shape[2] == N else visible.expand(-1, N, S)), poison


def _from_additive(mask: Tensor, layer: Any) -> tuple[Tensor, Tensor | None]:
    """``_convert``, once a forward pass: by its first layer, for those above it.

    A mask that is changed in place between passes is converted anew, by the first layer again.
    """
    if layer is None or torch.compiler.is_compiling():  # there, equal conversions become one
        return _convert(mask)
    version = None if mask.is_inference() else mask._version
    kept = getattr(mask, "_pydecode", None)
    if kept is None or layer <= kept[0] or kept[1] != version:
        kept = mask._pydecode = (layer, version, _convert(mask))  # type: ignore[attr-defined]
    made: tuple[Tensor, Tensor | None] = kept[2]
    return made


def _convert(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """A float mask as a bool one.

    Floats other than 0 and "hidden" are a bias, which no rank and no bool can say: an error where
    that is known, and where only the device knows (a GPU without ``pydecode.checks(True)``, or a
    compiled graph), NaN [B|1, N, 1, 1] in the result's rows.
    """
    if not mask.is_floating_point():
        raise NotImplementedError(f"attention_mask: expected bool or floats, got {mask.dtype}")
    if mask.requires_grad:
        raise NotImplementedError("attention_mask: a learned bias (it requires grad)")
    visible = ~(mask <= HIDDEN)  # so that NaN counts as visible, and as wrong
    wrong = (visible & (mask != 0)).any(-1)
    if checking() or (mask.device.type == "cpu" and not torch.compiler.is_compiling()):
        if bool(wrong.any()):
            raise NotImplementedError("attention_mask: a bias other than 0 and -inf")
        return visible, None
    return visible, torch.where(wrong, torch.nan, 0.0)[:, 0, :, None, None]
