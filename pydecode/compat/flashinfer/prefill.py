"""FlashInfer's prefill and append attention over a paged cache, on ``tree_attention``."""

import functools
from typing import Any

import torch
from torch import Tensor

import pydecode

from ...attention_arguments import MAX_ROWS
from ...validation import expect_choice, expect_tensor
from .prefill_state import Buffers, State, may_be_kept

Cache = Tensor | tuple[Tensor, Tensor]


class BatchPrefillWithPagedKVCacheWrapper:
    """Attention of the rows in flight of a batch over its paged cache, in which their K/V lie.

    Replaces ``flashinfer.BatchPrefillWithPagedKVCacheWrapper`` (v0.6.18): ``plan`` once a step,
    ``run`` once a layer. Key j of a request with Q rows and K keys is seen by its row i iff

    - ``custom_mask`` says so, or else, if ``causal``, j <= i + K - Q; and
    - ``window_left`` is negative or j >= i + K - Q - window_left.

    A row that sees nothing gives out 0 and lse -inf. Where ours differs:

    - **``plan`` does not synchronise.** Page lists become a block table on the device, whose width
      the host must know. It comes from ``block_tables``, or ``paged_kv_indptr`` if that is a CPU
      tensor, or ``max_sequence_kv``; failing these it is ``len(paged_kv_indices)``: the table has B
      times as many entries as there are pages, and every plan writes them all. Likewise
      ``qo_indptr``, if it is a CPU tensor, or ``max_token_per_sequence`` bounds a request's rows;
      failing these it is all of q's. In CUDA-graph mode, where later plans may hold anything, the
      first plan's ``block_tables``, ``max_sequence_kv`` and ``max_token_per_sequence`` count for
      all, else the buffers' sizes and the first plan's number of rows.
    - **A custom mask is read in the columns of the rows in flight only**, the last Q of K, for in
      decoding every row sees all keys before them. A mask that hides some of those needs
      ``plan(..., whole_mask=True)``; without it, what it hides there is seen, and under
      ``pydecode.checks(True)`` it raises. A mask of a request with more than 1024 rows is always
      read whole. In CUDA-graph mode masks are never read whole (NotImplementedError, ValueError).
    - A ``packed_custom_mask`` alone is right for batches (FlashInfer took counts of bits for counts
      of bytes there), a short mask raises where the host sees the lengths, and no mask outlives its
      plan: in CUDA-graph mode with a ``custom_mask_buf``, plans with and without masks may take
      turns under one captured graph.
    - Nothing is needed of the workspace but its device. Ignored, for they change speed only:
      ``backend`` (but "cudnn", whose indptr counts elements, raises), ``use_fp16_qk_reduction``,
      ``seq_lens``, ``seq_lens_q``, ``fixed_split_size``, ``disable_split_kv`` (results never depend
      on the batch), ``enable_pdl``; and without a rotary mode ``rope_scale`` and ``rope_theta``.
    - fp64 works on the reference backend, and lse is fp64 then.

    Args:
        float_workspace_buffer: any tensor on the device.
        kv_layout: "NHD" or "HND".
        use_cuda_graph: ``plan`` refills what a captured ``run`` reads. Needs the four buffers that
            follow; ``causal``, scales, window and soft cap are those of the capture.
        qo_indptr_buf, paged_kv_indptr_buf: int32 [B+1], for the wrapper's lifetime.
        paged_kv_indices_buf: int32, as many pages as the batch will ever have.
        paged_kv_last_page_len_buf: int32 [B].
        custom_mask_buf: uint8, as many bytes as a packed mask will ever have.
        mask_indptr_buf: not needed (offsets are kept in 64 bits).
        backend, jit_args, jit_kwargs: see above; ``jit_args`` raises.

    Raises:
        NotImplementedError: what is not served, by name: ``jit_args``, "cudnn",
            ``pos_encoding_mode`` (rotate before: ``pydecode.write_kv``), multi-item scoring
            (``prefix_len_ptr``, ``token_pos_in_items_ptr``, ``max_item_len_ptr``), an
            ``o_data_type`` other than q's, fp8 queries, NVFP4 caches, skipped softmax, ``*args``.
        ValueError, TypeError: a shape, dtype or number that does not fit.

    >>> import torch
    >>> from pydecode.compat.flashinfer import BatchPrefillWithPagedKVCacheWrapper
    >>> wrapper = BatchPrefillWithPagedKVCacheWrapper(torch.empty(0), "NHD")
    >>> wrapper.plan(
    ...     torch.tensor([0, 3, 5]), torch.tensor([0, 2, 3]), torch.tensor([4, 0, 2]),
    ...     torch.tensor([1, 4]), num_qo_heads=4, num_kv_heads=2, head_dim_qk=16, page_size=4,
    ...     causal=True, q_data_type=torch.float32)
    >>> wrapper.run(torch.randn(5, 4, 16), torch.randn(6, 2, 4, 2, 16)).shape
    torch.Size([5, 4, 16])
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        paged_kv_indptr_buf: Tensor | None = None,
        paged_kv_indices_buf: Tensor | None = None,
        paged_kv_last_page_len_buf: Tensor | None = None,
        custom_mask_buf: Tensor | None = None,
        mask_indptr_buf: Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
    ) -> None:
        expect_choice("kv_layout", kv_layout, ("NHD", "HND"))
        if jit_args is not None:
            raise NotImplementedError("jit_args: no custom kernels here")
        if backend == "cudnn":
            raise NotImplementedError("backend: 'cudnn' counts qo_indptr in elements, not rows")
        self.device = expect_tensor("float_workspace_buffer", float_workspace_buffer).device
        self._kv_layout = kv_layout
        self._use_cuda_graph = use_cuda_graph
        buffers = None
        if use_cuda_graph:
            lists = (qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf)
            buffers = Buffers.of(*lists, paged_kv_last_page_len_buf, custom_mask_buf)
        self._state = State(self.device, buffers)
        # Hq, D, page_size, Hkv, D, Dv and the dtypes of q and of the cache
        self._planned: tuple[Any, ...] | None = None
        self._passed: tuple[Any, ...] | None = None  # what the last run since the plan was handed
        self._log2_e: Tensor | None = None  # for an lse of its shape
        self._head_dim = 1

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._use_cuda_graph

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
        o_data_type: str | torch.dtype | None = None,
        non_blocking: bool = True,
        prefix_len_ptr: Tensor | None = None,
        token_pos_in_items_ptr: Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: Tensor | None = None,
        seq_lens: Tensor | None = None,
        seq_lens_q: Tensor | None = None,
        block_tables: Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        *,
        whole_mask: bool = False,
    ) -> None:
        """Takes a batch's page lists, lengths and mask; once a step, outside of graphs.

        The lists are converted here; the mask's bits by the first ``run`` that reads them.

        Args:
            qo_indptr: int32 or int64 [B+1], on the device or the host, as all that follow: request
                b's rows are q[qo_indptr[b]:qo_indptr[b+1]].
            paged_kv_indptr: [B+1]; paged_kv_indices: [pages]; paged_kv_last_page_len: [B], keys in
                a request's last page, 1 .. page_size. A request without pages has no keys.
            custom_mask: bool, flat, a request's [rows, keys] after the other; True: attend.
                ``causal`` does not count then.
            packed_custom_mask: uint8, the same in bits, little end first, each request from a new
                byte on; then ``custom_mask`` does not count.
            sm_scale: default head_dim_qk**-0.5. logits_soft_cap: None or 0: none.
            whole_mask: pydecode's own: the mask hides keys before the rows in flight, too.
        """
        _refuse(
            prefix_len_ptr=prefix_len_ptr,
            token_pos_in_items_ptr=token_pos_in_items_ptr,
            token_pos_in_items_len=token_pos_in_items_len or None,
            max_item_len_ptr=max_item_len_ptr,
        )
        self._head_dim = head_dim_qk
        self._plan_numbers(causal, pos_encoding_mode, window_left, logits_soft_cap, sm_scale)
        q_dtype = _dtype(q_data_type)
        kv_dtype = q_dtype if kv_data_type is None else _dtype(kv_data_type)
        if o_data_type is not None and _dtype(o_data_type) != q_dtype:
            raise NotImplementedError(f"o_data_type: expected q_data_type, got {o_data_type}")
        if kv_dtype == torch.uint8:
            raise NotImplementedError("kv_data_type: no NVFP4 caches here")

        self._state.plan(
            *(qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size),
            *(custom_mask, packed_custom_mask, causal, non_blocking),
            *(block_tables, max_token_per_sequence, max_sequence_kv, whole_mask),
        )
        Dv = head_dim_qk if head_dim_vo is None else head_dim_vo
        sizes = (num_qo_heads, head_dim_qk, page_size, num_kv_heads, head_dim_qk, Dv)
        self._planned, self._passed = (*sizes, q_dtype, kv_dtype), None

    begin_forward = plan

    def _plan_numbers(
        self,
        causal: bool,
        pos_encoding_mode: str,
        window_left: int,
        logits_soft_cap: float | None,
        sm_scale: float | None,
    ) -> None:
        """What may be set anew at each ``forward``."""
        if pos_encoding_mode != "NONE":
            raise NotImplementedError(
                f"pos_encoding_mode: expected 'NONE' (rotate q and k before), "
                f"got {pos_encoding_mode!r}"
            )
        self._causal, self._window_left = causal, window_left
        self._sm_scale = self._head_dim**-0.5 if sm_scale is None else sm_scale
        self._logits_soft_cap = logits_soft_cap or 0.0

    def run(
        self,
        q: Tensor,
        paged_kv_cache: Cache,
        *args: Any,
        q_scale: float | Tensor | None = None,
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Tensor | None = None,
        kv_cache_sf: Cache | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        use_fp16_softmax: bool | None = None,
        uses_spcompress: bool | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention as planned.

        Args:
            q: [total, Hq, D] of the planned dtype.
            paged_kv_cache: [pages, 2, page_size, Hkv, D] (HND: [pages, 2, Hkv, page_size, D]), or
                a tuple (k, v) of such without the 2. With pages of one key that dimension may be
                missing.
            q_scale, k_scale, v_scale: numbers or fp32 tensors of one entry; k_scale and v_scale
                also [Hkv].
            out: [total, Hq, Dv], and lse: fp32 [total, Hq]: the results go here.
            window_left: instead of the plan's (FlashInfer asserts that it is the same).
            sinks: [Hq], a logit a head in the softmax's denominator, and in lse.

        Returns:
            out [total, Hq, Dv] in q's dtype; with ``return_lse`` also lse fp32 [total, Hq], to the
            **base 2**: pydecode's (natural) times log2(e), contiguous where ``lse`` is not given.

        The first run of a plan with a mask also reads the mask's bits, one row a row of q, which
        the runs of the other layers find: at most 60 us of host time there, as a plan.
        """
        unserved = kv_cache_sf is not None or skip_softmax_threshold_scale_factor is not None
        if args or unserved or use_fp16_softmax or uses_spcompress:
            _refuse(
                args=args or None,
                kv_cache_sf=kv_cache_sf,
                skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor,
                use_fp16_softmax=use_fp16_softmax or None,
                uses_spcompress=uses_spcompress or None,
            )
        k_cache, v_cache = _split(paged_kv_cache, self._kv_layout)
        total = self._expect_planned(q, k_cache, v_cache)
        state, scale = self._state, self._sm_scale
        if isinstance(q_scale, Tensor):
            k_scale = q_scale.reshape(()) * (1.0 if k_scale is None else k_scale)
        elif q_scale is not None:
            scale *= q_scale
        wants_lse = return_lse or lse is not None
        result: Any = self._attend(
            *(q, k_cache, v_cache, total),
            self._window_left if window_left is None else window_left,
            {
                "block_table": state.table,
                "softmax_scale": scale,
                "softcap": self._logits_soft_cap,
                "sinks": sinks,
                "k_scale": None if k_scale is None else _one_entry(k_scale),
                "v_scale": None if v_scale is None else _one_entry(v_scale),
                "cu_seqlens_q": state.qo_indptr,
                "out": out,
                "return_lse": wants_lse,
            },
        )
        if not wants_lse:
            return result
        out, natural = result
        log2_e = self._log2_e
        if log2_e is None:
            log2_e = state.log2_e(natural)
            if may_be_kept(log2_e):
                self._log2_e = log2_e
        base_2 = log2_e.mul(natural.mT)
        if lse is None:
            return out, base_2
        if lse.shape != base_2.shape:
            want = list(base_2.shape)
            raise ValueError(f"lse: expected [total, Hq] = {want}, got {list(lse.shape)}")
        lse.copy_(base_2)
        return (out, lse) if return_lse else out

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def _expect_planned(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> int:
        """The number of rows."""
        shapes = (q.shape, k_cache.shape, v_cache.shape, q.dtype, k_cache.dtype)
        if shapes == self._passed:
            return shapes[0][0]
        planned = self._planned
        if planned is None:
            raise RuntimeError("run: expected a plan before it")
        rows, *heads = q.shape
        _, *page = k_cache.shape
        got = (*heads, *page, v_cache.size(-1), q.dtype, k_cache.dtype)
        if got != planned:
            raise ValueError(
                f"q, paged_kv_cache: expected Hq, D, page_size, Hkv, D, Dv and dtypes as planned, "
                f"{planned}, got {got}"
            )
        total = self._state.total
        if total is not None and rows != total:
            raise ValueError(f"q: expected qo_indptr[-1] = {total} rows, got {rows}")
        self._log2_e = None
        if not torch.compiler.is_compiling():
            self._passed = shapes
        return rows

    def _attend(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        total: int,
        window: int,
        kwargs: dict[str, Any],
    ) -> Any:
        """The operator that serves the planned mask."""
        state, causal, masked = self._state, self._causal, self._state.masked
        n = total if state.max_rows is None or total < state.max_rows else state.max_rows
        few = n <= MAX_ROWS
        kwargs["max_seqlen_q"] = n
        kwargs["window_size"] = window + 1 if window >= 0 else None
        if (masked and few and not state.whole) or (n <= state.capable and state.says(causal)):
            kwargs["mask"] = state.row_mask(total, n, window)
            kwargs["positions"] = None if window < 0 else state.row_keys(total)
            kwargs["cache_seqlens"] = state.lengths.context
            return pydecode.tree_attention(q, k_cache, v_cache, **kwargs)
        # of a window among rows in flight tree_attention knows nothing
        if not masked and few and (window < 0 or (causal and window >= n - 1)):
            kwargs["mask"] = "causal" if causal else None
            kwargs["cache_seqlens"] = state.lengths.context
            return pydecode.tree_attention(q, k_cache, v_cache, **kwargs)
        if masked and state.in_graphs:
            raise ValueError(_too_many_rows(n, state.max_rows))
        past = causal and not masked
        kwargs["q_rank"] = state.row_keys(total) if past else state.last_rank(total)
        kwargs["k_rank"] = state.key_ranks(k_cache.shape[1])
        kwargs["mask"] = state.key_mask(total, k_cache.shape[1]) if masked else None
        kwargs["cache_seqlens"] = state.lengths.keys
        return pydecode.ranked_attention(q, k_cache, v_cache, **kwargs)

    # ---- what FlashInfer keeps for older callers ------------------------------------------------

    def forward(
        self,
        q: Tensor,
        paged_kv_cache: Cache,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> Tensor:
        """``run`` under numbers that replace the plan's, also those left at their defaults."""
        self._plan_numbers(causal, pos_encoding_mode, window_left, logits_soft_cap, sm_scale)
        return self.run(q, paged_kv_cache, k_scale=k_scale, v_scale=v_scale)  # type: ignore

    def forward_return_lse(
        self,
        q: Tensor,
        paged_kv_cache: Cache,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``run_return_lse`` under numbers that replace the plan's."""
        self._plan_numbers(causal, pos_encoding_mode, window_left, logits_soft_cap, sm_scale)
        return self.run(  # type: ignore
            q, paged_kv_cache, k_scale=k_scale, v_scale=v_scale, return_lse=True
        )

    def end_forward(self) -> None:
        """Does nothing."""

    def reset_workspace_buffer(
        self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor
    ) -> None:
        """Does nothing: no workspace is used."""

    def workspace_size(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Bytes that ``plan`` needs of the caller, for whatever it is handed: none."""
        return 0, 0


def _refuse(**unserved: Any) -> None:
    for name, value in unserved.items():
        if value is not None:
            raise NotImplementedError(f"{name}: expected None, got {value!r}: not served here")


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _split(cache: Cache, layout: str) -> tuple[Tensor, Tensor]:
    """K and V [pages, page_size, Hkv, D], as views."""
    at = 1 if layout == "NHD" else 2  # where page_size is, behind the pages
    parts = cache.unbind(1) if isinstance(cache, Tensor) else cache
    if len(parts) != 2:
        raise ValueError(
            f"paged_kv_cache: expected [pages, 2, ...] or a tuple (k, v), got {len(parts)} parts"
        )
    k, v = parts
    if k.dim() == 3:
        k, v = k.unsqueeze(at), v.unsqueeze(at)
    return (k, v) if at == 1 else (k.transpose(1, 2), v.transpose(1, 2))


def _one_entry(scale: float | Tensor | None) -> float | Tensor | None:
    """A tensor of one entry as a number of no dimension."""
    if isinstance(scale, Tensor) and scale.dim() and scale.numel() == 1:
        return scale.reshape(())
    return scale


def _too_many_rows(n: int, bound: int | None) -> str:
    text = f"custom_mask: expected at most {MAX_ROWS} rows a request in CUDA-graph mode, got {n}"
    if bound is not None:
        return text
    return (
        f"{text} in all: tell plan how many a request has at most, with max_token_per_sequence or "
        f"a qo_indptr on the host"
    )
