"""What a kernel module says about its launches, so that they are proven without a GPU.

A module with Triton kernels has ``CONFIGURATIONS``, the table that its launcher reads, and
``static_calls(arch)``, which yields the launches of ``python -m pydecode.bench.static_report``.
"""

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import torch


class StaticCall(NamedTuple):
    """One launch as the launcher makes it: ``kernel[grid](**arguments, **table[configuration])``.

    kernel:         the ``@triton.jit`` function
    configuration:  a key of the module's ``CONFIGURATIONS``; its entry holds the keywords that the
                    launcher passes on (constexprs, num_warps, num_stages): never retyped here
    arguments:      the other arguments by name, with the alignment, strides and dtypes of real
                    calls. Tensors are stand-ins: ``torch.empty(..., device="meta")`` has real
                    strides, and a slice of it a real offset, at no cost
    dtype:          what the dots multiply, or what is streamed where there is none
    m:              rows that a ``tl.dot`` is to multiply: the tile's (BLOCK_M), or the call's where
                    no tile may be too small for the matrix units; None: no dot
    stages:         loads in flight; None: num_stages where there is a dot, else 1 (not pipelined)
    streamed:       bytes that one turn of the main loop reads in rows of 16 bytes and more
    aligned:        False: pointers or strides so odd that 16 bytes at once cannot be read
    note:           what is special, for the report ("odd stride")
    """

    kernel: Any
    configuration: Hashable
    arguments: Mapping[str, Any]
    dtype: torch.dtype
    m: int | None = None
    stages: int | None = None
    streamed: int = 0
    aligned: bool = True
    note: str = ""
