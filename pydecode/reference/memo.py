"""The layers of one forward pass share their metadata: what follows from it is worked out once."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.utils._pytree import tree_leaves

Result = TypeVar("Result")


def remember_last(function: Callable[..., Result]) -> Callable[..., Result]:
    """Keeps the last result while the very same CPU tensors come again, unchanged.

    Only on the CPU: on a GPU a kept tensor would be frozen into a captured graph. A tensor is
    unchanged if its version counter is; the kept references keep its identity from being reused.
    An inference tensor has no counter: only results of this decorator, which nobody changes, count.
    """
    last: list[tuple[Any, Any, Result]] = []

    @functools.wraps(function)
    def remembered(*args: Any) -> Result:
        key: list[Any] = []
        for x in args:
            if not isinstance(x, Tensor):
                key.append(x)
            elif x.device.type == "cpu" and not x.is_inference():
                key.append((id(x), x._version))
            elif hasattr(x, "_remembered"):
                key.append(id(x))
            else:
                return function(*args)
        if last and last[0][0] == key:
            return last[0][2]
        result = function(*args)
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.device.type == "cpu" and x.is_inference():
                x._remembered = True  # type: ignore[attr-defined]
        last[:] = [(key, args, result)]
        return result

    return remembered
