"""Counting what reads the device: on one, each is a synchronisation."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SYNCHRONISING = (
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.equal,
)


class Reads(TorchDispatchMode):
    """Counts ops that need the data on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        boolean_index = func.overloadpacket in (
            torch.ops.aten.index,
            torch.ops.aten.index_put,
        ) and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.count += func.overloadpacket in SYNCHRONISING or boolean_index
        return func(*args, **kwargs or {})
