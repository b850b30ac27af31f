"""The decode kernel's table under tuning: the workload that reads each of its entries."""

from collections.abc import Hashable
from typing import Any

import torch
from pydecode.triton_kernels.devices import architecture

from . import tree_attention
from .workload import Inputs, Workload

HEADS = 32, 8
NODES = {16: 4, 64: 16, 128: 64}
B, CONTEXT = 8, 8192


def tuned_by(key: Hashable, table: str | None = None) -> Workload | None:
    """A tree over pages, over a dense cache, in a window, or with odd strides; ``table``: default
    this GPU's."""
    assert isinstance(key, tuple)
    if key[0] == "clear":  # writes nothing that is worth a measurement
        return None
    if key[0] == "combine":
        return tree_attention.workload(1, CONTEXT, 16, torch.bfloat16, heads=HEADS, D=key[1])
    kind, m, d, arch, how = key
    if arch != (table or architecture(torch.empty(0, device="cuda"))):
        return None
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    plain = tree_attention.workload(B, CONTEXT, NODES[m], dtype, heads=HEADS, D=d)

    def make(device: torch.device) -> Inputs:
        args, kwargs = plain.make(device)
        more: dict[str, Any] = dict(window_size=CONTEXT) if how == "rich" else {}
        if how == "odd":
            args = torch.nn.functional.pad(args[0], (0, 1))[..., :d], *args[1:]
        if how == "whole":
            q, k_cache, v_cache, *rows = args
            k_cache, v_cache = (x.view(B, CONTEXT, *x.shape[2:]) for x in (k_cache, v_cache))
            args, more = (q, k_cache, v_cache, *rows), dict(block_table=None)
        return args, kwargs | more

    return plain._replace(label=f"{plain.label} {how}", make=make)
