"""Branch attention over a shared cache: the public function, its checks and its binding."""

from typing import Any

from torch import Tensor

from . import attention_arguments as arguments
from . import attention_data as data
from . import binding
from .backends import choose, triton_kernels, unavailable
from .reference import branch_attention as reference
from .replay import replayed
from .validation import checking, expect_dim, expect_index

HAS = ("reference", "triton")


@replayed
def branch_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cache_seqlens: int | Tensor | None = None,
    replace_at: int | Tensor | None = None,
    cache_starts: int | Tensor | None = None,
    num_branches: int | Tensor | None = None,
    causal: bool | Tensor = False,
    block_table: Tensor | None = None,
    num_tokens: int | Tensor | None = None,
    positions: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    window_size: int | None = None,
    sinks: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of K candidate blocks, each over the shared cache and itself, never a sibling.

    **The cache is never written**, unlike in ``flash_attn_with_kvcache``: ``write_kv`` does that.

    Branch c is ``block_attention(q[:, c], k_cache, v_cache, k[:, c], v[:, c], ...)``, but the cache
    is read once for all K: ``out_ci = softmax(scale * q_ci [K_cache, K_c]^T) [V_cache, V_c]``
    (drafted states of a diffusion block: Self Speculative Decoding, arXiv 2510.04147, and
    FreeDave; with ``causal`` the draft branches of SpecBranch).

    Args:
        q: [B, K, L, Hq, D], fp16, bf16, fp32 or fp64; K * L up to 1024.
        k_cache: [num_pages, page_size, Hkv, D] with a ``block_table``, else [B, S, Hkv, D]; q's
            dtype, or fp8 e4m3/e5m2 with scales. Any strides but the last (HND is a view).
        v_cache: the same with head dim Dv, which may differ from D.
        k, v: [B, K, L, Hkv, D] and [B, K, L, Hkv, Dv], never scaled.
        cache_seqlens: int or [B] int32/int64, cached lengths. None: the whole cache.
        replace_at: int or [B]: every branch stands in for the cached positions
            [replace_at, replace_at + L); a negative entry or None: no hole, the branches follow
            the context. Clipped to the cache; as wide as ``num_tokens`` where that is given.
        cache_starts: int or [B], first cached position that is seen.
        num_branches: int or [B], valid branches of a ragged batch; later ones give out 0, lse -inf.
        causal: bool, or bool 0-d or [B]: a row sees rows <= its own of its branch, and of the
            cache only what lies before the block's start.
        block_table: [B, max_pages] int32/int64. A page id outside the pool contributes nothing.
        num_tokens: int or [B], valid rows of each branch; later rows are seen by nobody and give
            out 0, lse -inf.
        positions: [B, K, L] or [B, 1, L], absolute positions, for the window only.
        softmax_scale: default D**-0.5. softcap: s <- softcap * tanh(s / softcap); 0: none.
        window_size: W >= 1, as in ``block_attention``, i counted inside the branch.
        sinks: [Hq], a logit a head added to the denominator (after softcap) and to lse.
        k_scale, v_scale: number or fp32 0-d, [Hkv] or [B, Hkv]: value = stored * scale.
        out: the result goes here, and is returned.

    Returns:
        out [B, K, L, Hq, Dv] in q's dtype; with ``return_lse`` also lse [B, K, Hq, L], natural
        log, fp32 (fp64 for fp64 inputs). A row that sees no key gives 0 and -inf (with sinks:
        lse = sink).

    Raises:
        ValueError, TypeError: a shape, dtype, device, stride or number that does not fit.
        BackendUnavailable: the named backend cannot run this call.

    >>> import torch, pydecode
    >>> q, k = torch.randn(1, 3, 4, 4, 16), torch.randn(1, 3, 4, 2, 16)
    >>> cache = torch.randn(1, 32, 2, 16)
    >>> out = pydecode.branch_attention(q, cache, cache, k, k, cache_seqlens=20)
    >>> alone = pydecode.block_attention(q[:, 2], cache, cache, k[:, 2], k[:, 2], cache_seqlens=20)
    >>> torch.allclose(out[:, 2], alone, atol=1e-5)
    True
    """
    rows = arguments.branches_over_cache(q, k_cache, v_cache, k, v, block_table)
    q, k_cache, v_cache, k_rows, v_rows, sizes = rows
    B, K, L = q.shape[:3]
    if positions is not None:
        expect_dim("positions", positions, 3, "[B, 1|K, L]")
        per_branch = 1 if positions.shape[1] == 1 else K
        expect_index("positions", positions, (B, per_branch, L), "[B, 1|K, L]", q.device)
    place = arguments.block_place(cache_seqlens, replace_at, cache_starts, sizes, q.device)
    branches = arguments.lengths("num_branches", num_branches, B, q.device, default=K, high=K)
    tail = arguments.tail(
        *(sizes, q.device, num_tokens, positions, softmax_scale, softcap, window_size, sinks),
        *(k_scale, v_scale),
    )
    if checking():
        data.check_context_data(rows, block_table, tail[:2], *place)
        data.check_lengths("num_branches", branches, B, q, K)
    args = (
        *(q, k_cache, v_cache, k_rows, v_rows, *arguments.causal_of(causal, B, q.device)),
        *(*place[0], *place[1], *place[2], *branches, block_table, *tail),
        *(return_lse, choose("branch_attention", backend, HAS, q, sizes.D, sizes.Dv)),
    )
    return arguments.deliver(_op, _op_out, _run, args, sizes.Dv, out, return_lse)


def _run(*args: Any) -> tuple[Tensor, Tensor]:
    *args, backend = args  # type: ignore[assignment]
    if backend == "reference":
        return reference.branch_attention(*args)
    if backend == "triton":
        return triton_kernels("branch_attention").branch_attention(*args)
    raise unavailable("branch_attention", backend, HAS)


def _fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return arguments.fake_outputs(q, v_cache.shape[-1], return_lse=args[-2])


_op = binding.bind("branch_attention", _run, _fake)
_op_out = binding.bind_out("branch_attention", arguments.run_into(_run))
