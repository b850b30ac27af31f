"""What a plan leaves for ``run``: tables, lengths and masks, at fixed places in CUDA-graph mode."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...attention_arguments import MAX_ROWS
from ...validation import expect_dim, expect_dtype, expect_tensor
from . import masks, page_lists
from .page_lists import Lengths

_LISTS = ("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")


class Buffers(NamedTuple):
    """The caller's memory in CUDA-graph mode."""

    lists: tuple[Tensor, ...]  # in the order of _LISTS
    custom_mask: Tensor | None

    @classmethod
    def of(cls, *buffers: Any) -> "Buffers":
        *lists, custom_mask = buffers
        for name, x in zip(_LISTS, lists):
            if not isinstance(x, Tensor):
                raise ValueError(f"{name}_buf: expected a tensor in CUDA-graph mode, got {x!r}")
        qo, kv, _, last = (x.shape[0] for x in lists)
        if not qo == kv == last + 1:
            raise ValueError(
                f"paged_kv_indptr_buf, paged_kv_last_page_len_buf: expected {qo} and {qo - 1} "
                f"entries as qo_indptr_buf has {qo}, got {kv} and {last}"
            )
        if custom_mask is not None:
            expect_dtype("custom_mask_buf", expect_tensor("", custom_mask), (torch.uint8,))
        return cls(tuple(lists), custom_mask)


class State:
    """Filled by ``plan``. With ``buffers`` (CUDA-graph mode) all tensors are refilled in place."""

    lengths: Lengths
    table: Tensor  # [B, width]
    qo_indptr: Tensor  # [B+1]
    causal: bool
    masked: bool  # the plan has a custom mask
    whole: bool  # which may hide keys before the rows in flight
    total: int | None  # rows of the batch, where the host can see them

    def __init__(self, device: torch.device, buffers: Buffers | None) -> None:
        self.device = device
        self.buffers = buffers
        self.max_rows: int | None = None  # a bound of a request's rows; None: that of the batch
        self.capable = -1  # up to so many rows, every mask is read from custom_mask_buf
        if buffers is not None and buffers.custom_mask is not None:
            self.capable = min(MAX_ROWS, 4 * buffers.custom_mask.shape[0])
        self._first_total: int | None = None
        self._uniform: Tensor | None = None
        self._kept: dict[str, Tensor] = {}
        # One entry a row of q, made when a run wants them, by what they are made for.
        self._rows: dict[tuple[int, ...], Tensor] = {}
        # What no plan changes.
        self._constants: dict[Any, Tensor] = {}

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        page_size: int,
        custom_mask: Tensor | None,
        packed_custom_mask: Tensor | None,
        causal: bool,
        non_blocking: bool,
        block_tables: Tensor | None,
        max_rows: int | None,
        max_keys: int | None,
        whole_mask: bool,
    ) -> None:
        lists = (qo_indptr, kv_indptr, indices, last_page_len)
        for name, x in zip(_LISTS, lists):
            expect_dim(name, expect_tensor(name, x), 1, "one")
        B = (qo_indptr if self.buffers is None else self.buffers.lists[0]).shape[0] - 1
        if not qo_indptr.shape == kv_indptr.shape == (B + 1,) or last_page_len.shape != (B,):
            raise ValueError(
                f"qo_indptr, paged_kv_indptr, paged_kv_last_page_len: expected {B + 1}, {B + 1} "
                f"and {B} entries, got {len(qo_indptr)}, {len(kv_indptr)} and {len(last_page_len)}"
            )
        self._plan_sizes(qo_indptr, kv_indptr, indices, page_size, block_tables, max_rows, max_keys)

        def moved(x: Tensor) -> Tensor:
            return x.to(self.device, non_blocking=non_blocking)

        if self.buffers is None:
            self.qo_indptr, kv, pages, last = map(moved, lists)
        else:
            for buffer, x in zip(self.buffers.lists, lists):
                buffer[: x.shape[0]].copy_(x, non_blocking=non_blocking)
            self.qo_indptr, kv, pages, last = self.buffers.lists
        if qo_indptr.device == kv_indptr.device == last_page_len.device:
            numbers = page_lists.lengths_of(qo_indptr, kv_indptr, last_page_len, page_size)
        else:
            numbers = page_lists.lengths_of(self.qo_indptr, kv, last, page_size)
        lengths = Lengths(*numbers)
        self.lengths = Lengths(*self._keep("lengths", moved(numbers)))
        if block_tables is None:
            block_tables = page_lists.block_table(kv, pages, self._width)
        self.table = self._keep("table", moved(block_tables))
        if self.buffers is None:
            self._rows = {}
            if len(self._constants) > 64:  # sizes of batches
                self._constants = {}
        elif whole_mask:
            raise NotImplementedError("whole_mask: not in CUDA-graph mode")
        self.causal = causal
        self.whole = whole_mask or (self.buffers is None and (self.max_rows or 0) > MAX_ROWS)
        self._plan_mask(custom_mask, packed_custom_mask, lengths, causal, non_blocking)
        for key, x in self._rows.items():
            x.copy_(self._make_rows(*key))

    def _keep(self, name: str, fresh: Tensor) -> Tensor:
        """``fresh``; in CUDA-graph mode a tensor of its own, the same in every plan."""
        if self.buffers is None:
            return fresh
        if name not in self._kept:
            self._kept[name] = torch.empty_like(fresh)
        return self._kept[name].copy_(fresh)

    def _plan_sizes(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        indices: Tensor,
        page_size: int,
        block_tables: Tensor | None,
        max_rows: int | None,
        max_keys: int | None,
    ) -> None:
        """The table's width and a bound of a request's rows: what the host must know."""
        rows, pages = page_lists.host_max(qo_indptr), page_lists.host_max(kv_indptr)
        self.total = None if rows is None else int(qo_indptr[-1])
        most = indices.shape[0]
        if self.buffers is not None:
            most = self.buffers.lists[2].shape[0]
            _expect_at_most("paged_kv_indices", "paged_kv_indices_buf's size", most, len(indices))
        room = None if max_keys is None else min(-(-max_keys // page_size), most)
        if block_tables is not None:
            room = expect_tensor("block_tables", block_tables).shape[-1]
        if self.buffers is None:
            _expect_at_most("max_token_per_sequence", "a bound of all rows", max_rows, rows)
            _expect_at_most("max_sequence_kv, block_tables", "a bound of all pages", room, pages)
            self.max_rows = max_rows if rows is None else rows
            if room is None or (block_tables is None and pages is not None):
                room = most if pages is None else pages
            self._width = room
            return
        if "table" not in self._kept:  # later plans may share rows and pages out in any way
            self._first_total = self.total
            self.max_rows = self.total if max_rows is None else max_rows
            self._width = most if room is None else room
        first = "what the first plan (CUDA-graph mode) was told"
        if block_tables is not None and room != self._width:
            raise ValueError(f"block_tables: expected {self._width} columns, {first}, got {room}")
        _expect_at_most("qo_indptr", first, self._first_total, self.total)
        _expect_at_most("max_token_per_sequence", first, self.max_rows, rows, max_rows)
        _expect_at_most("max_sequence_kv", f"{first}, in pages", self._width, pages, room)

    def _plan_mask(
        self,
        custom_mask: Tensor | None,
        packed_custom_mask: Tensor | None,
        lengths: Lengths,
        causal: bool,
        non_blocking: bool,
    ) -> None:
        self.masked = custom_mask is not None or packed_custom_mask is not None
        buffer = None if self.buffers is None else self.buffers.custom_mask
        if self.masked:
            bits, places = masks.of_plan(
                custom_mask, packed_custom_mask, lengths, self.whole, pack=self.buffers is not None
            )
        elif buffer is not None:
            # a captured run reads custom_mask_buf, so what this plan means must stand there
            if self._uniform is None:
                self._uniform = masks.causal_bits(self.capable, self.device)
            bits = self._uniform
            places = masks.uniform_places(lengths, causal, self.capable)
        else:
            return
        if self.buffers is not None:
            if buffer is None:
                raise ValueError("custom_mask_buf: expected a tensor for masks in CUDA-graph mode")
            if bits.shape[0] > buffer.shape[0]:
                raise ValueError(
                    f"custom_mask_buf: expected at least {bits.shape[0]} bytes, "
                    f"got {buffer.shape[0]}"
                )
            buffer[: bits.shape[0]].copy_(bits, non_blocking=non_blocking)
            bits = buffer
        self._bits = bits.to(self.device, non_blocking=non_blocking)
        packed = torch.stack(places).to(self.device, non_blocking=non_blocking)
        self._places = self._keep("places", packed)

    # ---- what a run asks for --------------------------------------------------------------------

    @property
    def in_graphs(self) -> bool:
        return self.buffers is not None

    def says(self, causal: bool) -> bool:
        """Whether a plan without a mask left one all the same, for graphs that read one."""
        return not self.masked and causal == self.causal

    def row_mask(self, total: int, n: int, window_left: int) -> Tensor:
        """The packed mask among rows in flight, [total, ceil(n/64)]."""
        return self._row_tensor(total, -(-n // 64), window_left)

    def key_mask(self, total: int, page_size: int) -> Tensor:
        """The packed mask of all keys, [total, ceil(capacity/64)]."""
        return self._row_tensor(total, -(-self.table.shape[1] * page_size // 64))

    def row_keys(self, total: int) -> Tensor:
        """Which key of its request each row is, int32 [total]."""
        return self._row_tensor(total)

    def _row_tensor(self, *key: int) -> Tensor:
        """Made once a plan; under capture, made by the graph, from what plans refill."""
        if key not in self._rows:
            self._rows[key] = self._make_rows(*key)
        return self._rows[key]

    def _make_rows(self, total: int, *mask: int) -> Tensor:
        if not mask:
            owner, i = page_lists.owners(self.qo_indptr, total)
            return (self.lengths.context[owner] + i).int()
        words, *window = mask
        rows = (self.qo_indptr, total, words)
        made = masks.rows_mask(self._bits, self._places, *rows, whole=not window)
        return made & masks.rows_window(*rows, *window) if window and window[0] >= 0 else made

    def key_ranks(self, page_size: int) -> Tensor:
        """0, 1, .. for every place of the table, int32 [1, capacity]."""
        n = self.table.shape[1] * page_size
        found = self._constants.get(("keys", n))
        if found is not None:
            return found
        return self._constant(
            ("keys", n), torch.arange(n, dtype=torch.int32, device=self.device)[None]
        )

    def last_rank(self, total: int) -> Tensor:
        """A rank that sees every key, int32 [total]."""
        found = self._constants.get(("rows", total))
        if found is not None:
            return found
        last = torch.full((total,), 2**31 - 2, dtype=torch.int32, device=self.device)
        return self._constant(("rows", total), last)

    def log2_e(self, lse: Tensor) -> Tensor:
        """log2(e) in the shape [total, Hq] of FlashInfer's lse, for one of [Hq, total].

        Not a number: as the first factor it makes the product contiguous, by the rule that results
        of elementwise operations are laid out as their first operand. No two dims may have the same
        stride for that, nor may a stride be 0; so its rows overlap.
        """
        key = (lse.shape, lse.dtype)
        found = self._constants.get(key)
        if found is not None:
            return found
        Hq, total = lse.shape
        entries = lse.new_full((2 * total + Hq,), math.log2(math.e))
        return self._constant(key, entries.as_strided((total, Hq), (2, 1)))

    def _constant(self, key: Any, made: Tensor) -> Tensor:
        if may_be_kept(made):
            self._constants[key] = made
        return made


def may_be_kept(made: Tensor) -> bool:
    """What a capture or a trace makes is that graph's own."""
    capturing = made.is_cuda and torch.cuda.is_current_stream_capturing()
    return not capturing and not torch.compiler.is_compiling()


def _expect_at_most(name: str, what: str, bound: int | None, *seen: int | None) -> None:
    """What is None is not known."""
    most = max((x for x in seen if x is not None), default=0)
    if bound is not None and most > bound:
        raise ValueError(f"{name}: expected {what}, got {bound} where there are {most}")
