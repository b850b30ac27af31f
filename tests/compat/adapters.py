"""Every adapter of ``pydecode.compat`` with one small call, from which the common tests are made.

A peer's file ``calls_<peer>.py`` holds ``CALLS = {"name": Adapter(make), ...}``.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class Adapter(NamedTuple):
    """``make(batch)`` gives a fresh call: (function, args, kwargs), all tensors on the CPU."""

    make: Callable[[int], Call]
    # Host time beyond the op, in us: 5 for a reshape and a call, 60 where tree links or page lists
    # are converted.
    budget: float = 5.0
    # Why it is not compiled, or not run on tensors without data; "" where it is.
    not_compiled: str = ""
    reads_data: str = ""


def adapters() -> dict[str, Adapter]:
    files = sorted(Path(__file__).parent.glob("calls_*.py"))
    modules = [importlib.import_module(file.stem) for file in files]
    return {
        f"{module.__name__.removeprefix('calls_')}.{name}": adapter
        for module in modules
        for name, adapter in module.CALLS.items()
    }


ADAPTERS = adapters()
