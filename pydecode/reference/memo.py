"""The layers of one forward pass share their metadata: what follows from it is worked out once."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Result = TypeVar("Result")


def remember_last(function: Callable[..., Result]) -> Callable[..., Result]:
    """Keeps the last result while arguments of the same content come again.

    Contents are compared, not identities or version counters: numpy may have changed a tensor
    behind torch's back. Only a result of this decorator, which nobody changes, is known by its
    identity. On the CPU only: on a GPU a comparison synchronises, and a kept tensor would be
    frozen into a captured graph.
    """
    last: list[tuple[list[Any], Result]] = []

    @functools.wraps(function)
    def remembered(*args: Any) -> Result:
        if any(isinstance(x, Tensor) and x.device.type != "cpu" for x in args):
            return function(*args)
        entry = last[0] if last else None
        if entry is not None and all(map(_same, entry[0], args)):
            return entry[1]
        # the result may be a view of what it is made of: of copies, then, not the caller's memory
        kept = [_kept(x) for x in args]
        result = function(*kept)
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                x._remembered = True  # type: ignore[attr-defined]
        last[:] = [(kept, result)]
        return result

    return remembered


def _kept(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) and not hasattr(x, "_remembered") else x


def _same(kept: Any, x: Any) -> bool:
    if kept is x:
        return True
    if not isinstance(kept, Tensor) or not isinstance(x, Tensor):
        return type(kept) is type(x) and kept == x
    if hasattr(kept, "_remembered"):
        return False
    return kept.dtype == x.dtype and kept.shape == x.shape and torch.equal(kept, x)
