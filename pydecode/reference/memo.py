"""The layers of one forward pass share their metadata: what follows from it is worked out once."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

Result = TypeVar("Result")


def remember_last(function: Callable[..., Result]) -> Callable[..., Result]:
    """Keeps the last result while the very same CPU tensors come again, unchanged.

    Only on the CPU: on a GPU a kept tensor would be frozen into a captured graph. A tensor is
    unchanged if its version counter is; the kept references keep its identity from being reused.
    """
    last: list[tuple[Any, Any, Result]] = []

    @functools.wraps(function)
    def remembered(*args: Any) -> Result:
        tensors = [x for x in args if isinstance(x, Tensor)]
        if any(x.device.type != "cpu" or x.is_inference() for x in tensors):
            return function(*args)
        key = tuple((id(x), x._version) if isinstance(x, Tensor) else x for x in args)
        if last and last[0][0] == key:
            return last[0][2]
        result = function(*args)
        last[:] = [(key, args, result)]
        return result

    return remembered
