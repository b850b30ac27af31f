"""The kernel that moves an accepted path's rows, in place.

A program owns some columns of one request's rows in one layer of K or V, and moves them for every
step of the path, MOVES steps at a time: it loads them all, waits, then stores them all. Rows are
words that mean nothing, as wide as every address allows, so fp8, NaN and denormals keep their bits.
"""

import triton
import triton.language as tl

from .cache_slots import slots

PATH = tl.constexpr(128)  # entries of a path that are looked at together


@triton.jit
def checked(path, n, stride, P):
    """Whether path[0..n] starts at 0 and strictly increases; its last node, and how many of its
    first nodes stay where they are (path[j] == j)."""
    faults, still = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for i in range(0, tl.minimum(n + 1, P), PATH):
        j = i + tl.arange(0, PATH)
        used = (j < P) & (j <= n)
        node = tl.load(path + j * stride, mask=used, other=0).to(tl.int64)
        before = tl.load(path + (j - 1) * stride, mask=used & (j > 0), other=-1).to(tl.int64)
        faults += tl.sum((used & (node <= before)).to(tl.int32))
        still += tl.sum((used & (node == j)).to(tl.int32))
    last = tl.load(path + tl.minimum(tl.maximum(n, 0), P - 1) * stride).to(tl.int64)
    good = (n >= 0) & (n < P) & (faults == 0) & (tl.load(path).to(tl.int64) == 0)
    return good, last, still


@triton.jit
def words(x, UNITS: tl.constexpr, WORD: tl.constexpr):
    """A tensor, or an address, as a pointer to words."""
    if x.dtype.is_ptr():
        x = x.to(tl.pointer_type(WORD), bitcast=True)
    else:
        x = x.to(tl.pointer_type(WORD))
    if UNITS == 2:
        x = tl.multiple_of(x, [16])
    return x


@triton.jit
def move(
    cache, layer_table, rows, path, table, layer, b, start, first, last, heads, pages, page_size,
    width, strides, row_strides, stride_path, stride_table, column, KIND: tl.constexpr,
    WORDS: tl.constexpr, UNITS: tl.constexpr, WORD: tl.constexpr, MOVES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Moves of steps [first, last] of the path, of columns [column, column + BLOCK) of the rows.

    Why loading MOVES rows before storing them is enough: step j writes position j and reads
    position path[j] >= j, and path strictly increases. So a later step's source lies past every
    earlier step's target (path[i] >= i > j): no store here destroys what a later turn reads. Only
    the other way round is there a conflict: the target j may be an earlier step's source. Those
    are in this turn, and the barrier lies between, or in an earlier one, and are read. No other
    program touches these columns of this request's rows.
    """
    stride_page, stride_slot, stride_head = strides[1], strides[2], strides[3]
    if layer_table is None:
        cache = words(cache, UNITS, WORD) + layer * strides[0] * UNITS
    else:
        entry = layer_table + layer * 8 + KIND * 4
        cache = words(tl.load(entry), UNITS, WORD)
        stride_page, stride_slot = tl.load(entry + 1), tl.load(entry + 2)
        stride_head = tl.load(entry + 3)
    if rows is not None:
        rows = words(rows, UNITS, WORD)
        rows += (layer * row_strides[0] + b * row_strides[1]) * UNITS
    o = column + tl.arange(0, BLOCK)
    inside = (o < heads * WORDS)[None, :]
    head, word = (o // WORDS).to(tl.int64), o % WORDS
    at = head * stride_head * UNITS + word
    for i in range(first, last + 1, MOVES):
        j = i + tl.arange(0, MOVES)
        live = j <= last
        node = tl.load(path + j * stride_path, mask=live, other=0).to(tl.int64)
        to, slot, real = slots(start + j, live, b, table, stride_table, pages, page_size, width)
        target = (to * stride_page + slot * stride_slot) * UNITS
        if rows is None:
            page, slot, there = slots(
                start + node, live, b, table, stride_table, pages, page_size, width
            )
            real = real & there
            source = cache + (page * stride_page + slot * stride_slot) * UNITS
            source = source[:, None] + at[None, :]
        else:
            source = rows + (node * row_strides[2] * UNITS)[:, None]
            source = source + (head * row_strides[3] * UNITS + word)[None, :]
        keep = real[:, None] & inside
        moved = tl.load(source, mask=keep)
        tl.debug_barrier()
        tl.store(cache + target[:, None] + at[None, :], moved, mask=keep)


@triton.jit(
    do_not_specialize=[
        *("P", "heads", "pages", "page_size", "width", "num_rows", "slices"),
        *("stride_path_b", "stride_path", "stride_num", "stride_length", "stride_table_b"),
        *("stride_table", "k_strides", "v_strides", "k_row_strides", "v_row_strides"),
    ]
)
def commit(
    k_cache,
    v_cache,
    layer_table,
    k_rows,
    v_rows,
    path,
    num_accepted,
    cache_seqlens,
    block_table,
    lengths,
    P,
    heads,
    pages,
    page_size,
    width,
    num_rows,
    slices,
    stride_path_b,
    stride_path,
    stride_num,
    stride_length,
    stride_table_b,
    stride_table,
    k_strides,
    v_strides,
    k_row_strides,
    v_row_strides,
    K_WORDS: tl.constexpr,
    V_WORDS: tl.constexpr,
    UNITS: tl.constexpr,
    WORD: tl.constexpr,
    MOVES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (b and slice of the row, layer, K or V). Strides of caches (layer, page, slot, head)
    and of rows (layer, b, node, head) count UNITS words. layer_table [layers, 2, 4] int64, for a
    list of caches: address, and strides of page, slot and head.
    """
    i_b, i_slice = tl.program_id(0) // slices, tl.program_id(0) % slices
    layer, b = tl.program_id(1).to(tl.int64), i_b.to(tl.int64)

    # the request: is its path good?
    n = tl.load(num_accepted + b * stride_num).to(tl.int64)
    start = tl.load(cache_seqlens + b * stride_length).to(tl.int64)
    path += b * stride_path_b
    good, node, still = checked(path, n, stride_path, P)
    end = node if k_rows is None else n  # the furthest position of all, from start
    capacity = page_size.to(tl.int64) * width
    good = good & (node < num_rows) & (start >= 0) & (start < capacity - end)
    if (i_slice == 0) & (layer == 0) & (tl.program_id(2) == 0):
        tl.store(lengths + b, (start + tl.where(good, n + 1, 0)).to(lengths.dtype.element_ty))

    # its rows: without staging, those that stay where they are are skipped
    first = still if k_rows is None else 0
    last = tl.where(good, n, -1).to(tl.int32)
    if block_table is not None:
        block_table += b * stride_table_b
    if tl.program_id(2) == 0:
        move(
            k_cache, layer_table, k_rows, path, block_table, layer, b, start, first, last, heads,
            pages, page_size, width, k_strides, k_row_strides, stride_path, stride_table,
            i_slice * BLOCK, 0, K_WORDS, UNITS, WORD, MOVES, BLOCK,
        )  # fmt: skip
    else:
        move(
            v_cache, layer_table, v_rows, path, block_table, layer, b, start, first, last, heads,
            pages, page_size, width, v_strides, v_row_strides, stride_path, stride_table,
            i_slice * BLOCK, 1, V_WORDS, UNITS, WORD, MOVES, BLOCK,
        )  # fmt: skip
