"""``flashinfer.cascade`` on pydecode: merging attention states, whose LSE is in base 2."""

import torch
from torch import Tensor

import pydecode


def merge_state(v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the segments A and B from the attention over each, on ``merge_states``.

    Replaces ``flashinfer.merge_state`` (seen at fb28d7242, August 2026).

    Args:
        v_a, v_b: [n, H, D], fp16 to fp64.
        s_a, s_b: [n, H], **base-2** log-sum-exp: log2(e) times pydecode's. Any float dtype.

    Returns:
        v [n, H, D] in v_a's dtype, and s [n, H] in base 2, fp32 (fp64 for fp64 states).

    A segment whose s is -inf counts for nothing, even if its v is NaN (theirs multiplies it by 0);
    where both are, v is 0 and s -inf. s may be any view, such as the transpose of pydecode's lse.

    Raises:
        ValueError, TypeError: an argument that does not fit.

    >>> import torch
    >>> from pydecode.compat.flashinfer import merge_state
    >>> v, s = torch.ones(1, 1, 2), torch.zeros(1, 1)
    >>> merge_state(v, s, 3 * v, s)
    (tensor([[[2., 2.]]]), tensor([[1.]]))
    """
    out, lse = _merge_two(v_a, s_a, v_b, s_b)
    return out, lse.contiguous()


def merge_states(v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Merges M attention states at once.

    Replaces ``flashinfer.merge_states`` (seen at fb28d7242): v [n, M, H, D] and s [n, M, H] give
    v [n, H, D] and s [n, H], all else as in ``merge_state``. No state at all gives 0 and -inf.
    """
    if v.dim() != 4 or s.shape != v.shape[:3]:
        raise ValueError(
            f"v, s: expected [n, M, H, D] and [n, M, H], got {list(v.shape)}, {list(s.shape)}"
        )
    if v.shape[1] == 0:
        empty = s.new_full((v.shape[0], v.shape[2]), -torch.inf, dtype=_lse_dtype(v))
        return v.new_zeros(v.shape[0], *v.shape[2:]), empty
    dtype = _lse_dtype(v)
    s = s if s.dtype == dtype else s.to(dtype)
    out, lse = pydecode.merge_states(v.transpose(0, 1), s.permute(1, 2, 0), log_base=2.0)
    return out, lse.mT.contiguous()


def merge_state_in_place(
    v: Tensor, s: Tensor, v_other: Tensor, s_other: Tensor, mask: Tensor | None = None
) -> None:
    """Merges another state into (v, s).

    Replaces ``flashinfer.merge_state_in_place`` (seen at fb28d7242), shapes as in ``merge_state``.
    ``mask`` [n], bool or 0/1: a row where it is not set keeps its bits. Ours updates an s of any
    float dtype (theirs updates an fp32 copy of any other).
    """
    _expect_two(v, s, v_other, s_other)
    if mask is not None:
        if mask.shape != v.shape[:1]:
            raise ValueError(f"mask: expected [n] = [{v.shape[0]}], got {list(mask.shape)}")
        mask = mask.bool()
    dtype, lse = _lse_dtype(v), s.mT
    other = s_other.mT
    if s.dtype == s_other.dtype == dtype:
        states = [v, v_other], [lse, other]
        pydecode.merge_states(*states, mask=mask, log_base=2.0, out=v, out_lse=lse)
        return
    states = [v, v_other], [lse.to(dtype), other.to(dtype)]
    lse.copy_(pydecode.merge_states(*states, mask=mask, log_base=2.0, out=v)[1])


def _merge_two(v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> tuple[Tensor, Tensor]:
    """s [n, H], a view."""
    _expect_two(v_a, s_a, v_b, s_b)
    dtype = _lse_dtype(v_a)
    # a conversion that has nothing to do still costs the host 0.7 us
    s_a, s_b = (s if s.dtype == dtype else s.to(dtype) for s in (s_a, s_b))
    out, lse = pydecode.merge_states([v_a, v_b], [s_a.mT, s_b.mT], log_base=2.0)
    return out, lse.mT


def _expect_two(v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> None:
    if not s_a.shape == s_b.shape == v_a.shape[:-1]:
        got = ", ".join(str(list(x.shape)) for x in (v_a, s_a, s_b))
        raise ValueError(f"v, s, s: expected [n, H, D], [n, H] and [n, H], got {got}")


def _lse_dtype(v: Tensor) -> torch.dtype:
    return torch.float64 if v.dtype == torch.float64 else torch.float32
