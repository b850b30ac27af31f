"""Where cache positions lie: pages and slots, for the kernels that write caches."""

import triton
import triton.language as tl


@triton.jit
def slots(positions, live, b, table, stride_table, pages, page_size, width):
    """Page and slot (int64) of request b's positions, and which of those ``live`` are real.

    Without a table a request is its own page. With one (already b's row, width entries) a position
    is real if it is not negative, below the capacity, and its page lies in the pool.
    """
    real = live & (positions >= 0) & (positions < page_size.to(tl.int64) * width)
    at = tl.where(real, positions, 0).to(tl.int64)
    if table is None:
        page, slot = tl.zeros_like(at) + b, at
    else:
        column = at // page_size
        slot = at - column * page_size
        page = tl.load(table + column * stride_table, mask=real, other=-1).to(tl.int64)
        real = real & (page >= 0) & (page < pages)
        page = tl.where(real, page, 0)
    return page, slot, real
