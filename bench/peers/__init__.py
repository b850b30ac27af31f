"""Peers: what else computes the same thing, each in a file of a few lines.

A peer's file has ``NAME``, ``missing() -> str`` (why it is not here, or "") and ``OPS``: op -> a
function of (workload's args, kwargs) that returns a call without arguments. What is prepared before
that call (masks, plans, packed copies) is not timed; it says so in its docstring. A shape or a rule
that a peer does not have raises ``Unsupported``.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

Prepare = Callable[..., Callable[[], object]]


class Unsupported(Exception):
    """The peer does not have this shape, rule or dtype; the message says which."""


class Peer(NamedTuple):
    """One contender beside ours."""

    name: str
    missing: str  # why it is not here, or ""
    ops: dict[str, Prepare]


def peers() -> list[Peer]:
    """All peers, those that are missing included."""
    found = []
    for info in pkgutil.iter_modules(__path__):
        module: Any = importlib.import_module(f"{__name__}.{info.name}")
        if hasattr(module, "OPS"):
            found.append(Peer(module.NAME, module.missing(), module.OPS))
    return found
