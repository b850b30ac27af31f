"""Soft embeddings of masked positions: the public function, its checks and its binding."""

from typing import Any

from torch import Tensor

from . import binding
from . import sampling_arguments as arguments
from .backends import choose, unavailable
from .reference import soft_embed as reference
from .reference.numbers import compute_dtype
from .replay import replayed
from .validation import FLOATS, expect_device, expect_dim, expect_dtype, expect_tensor, number

HAS = ("reference", "triton")


@replayed
def soft_embed(
    logits: Tensor,
    embedding: Tensor,
    *,
    mask_id: int,
    top_p: float | Tensor | None = None,
    ratio: float | Tensor = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Mixes the mask's embedding with the expected one, the more the surer the model is.

    ``e = (1-a) E[mask_id] + a sum_{v in top-p} p(v) E[v]`` with p renormalised over its top-p
    support and ``a = ratio (1 - H / log V)``, H the entropy of the whole law (latent refinement
    decoding, arXiv 2510.11052, eqs. 3-5).

    Args:
        logits: [..., V], fp16, bf16, fp32 or fp64, at temperature 1; nothing is excluded.
        embedding: [V, E], any float dtype; rows past V (a padded table) are only used by mask_id.
        mask_id: a row of ``embedding``.
        top_p: number, 0-d or [B] (B: all leading dimensions but L); None or >= 1: the whole law.
        ratio: number, 0-d or [B]; 0 gives the mask's embedding.

    Returns:
        (embeddings [..., E] in embedding's dtype, entropy [...] in nats, fp32, or fp64 for fp64
        logits). A row with a NaN or with nothing allowed gives the mask's embedding, entropy NaN.
        For V = 1, where H / log V is 0/0, a = ratio.

    Raises:
        ValueError, TypeError: a shape, dtype, device or stride that does not fit, by name.
        BackendUnavailable: the named backend cannot run this call.

    >>> import torch, pydecode
    >>> table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]])
    >>> logits = torch.tensor([[999.0, 0.0, 0.0], [0.0, 0.0, 0.0]])  # sure, and not at all
    >>> embeddings, entropy = pydecode.soft_embed(logits, table, mask_id=2)
    >>> embeddings.tolist()
    [[1.0, 0.0], [9.0, 9.0]]
    """
    logits = arguments.expect_logits("logits", logits)
    embedding = expect_tensor("embedding", embedding)
    expect_dtype("embedding", embedding, FLOATS)
    expect_dim("embedding", embedding, 2, "[V, E]")
    V = logits.shape[-1]
    if embedding.shape[0] < V:
        raise ValueError(
            f"embedding: expected at least V = {V} rows, got shape {list(embedding.shape)}"
        )
    expect_device("embedding", embedding, logits.device)
    chosen = choose("soft_embed", backend, HAS, logits)
    choose("soft_embed", backend, HAS, embedding)
    B = arguments.batch_of(logits.shape[:-1])
    args = (
        *(logits, embedding, arguments.token_id("mask_id", mask_id, embedding.shape[0])),
        *number("top_p", 1.0 if top_p is None else top_p, B, logits.device),
        *number("ratio", ratio, B, logits.device, minimum=0),
        chosen,
    )
    embeddings, entropy = binding.call(_op, _run, *args)
    return embeddings, entropy


def _run(*args: Any) -> tuple[Tensor, Tensor]:
    *args, backend = args  # type: ignore[assignment]
    if backend == "reference":
        return reference.soft_embed(*args)
    if backend == "triton":
        from .triton_kernels import soft_embed as triton

        return triton.soft_embed(*args)
    raise unavailable("soft_embed", backend, HAS)


def _fake(logits: Tensor, embedding: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    rows = logits.shape[:-1]
    return (
        embedding.new_empty((*rows, embedding.shape[1])),
        logits.new_empty(rows, dtype=compute_dtype(logits.dtype)),
    )


_op = binding.bind("soft_embed", _run, _fake)
