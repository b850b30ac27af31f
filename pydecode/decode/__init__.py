"""Whole decoding loops made of pydecode's ops alone, each a module with its own ``generate``.

``speculative``: draft and verify (chains, trees, lookup, a model's own layers). ``diffusion``:
masked diffusion, with every rule and every kind of cache. ``self_speculative``: the same output as
``diffusion``, several steps a forward pass. Each is imported when it is first used.

>>> from pydecode.decode import diffusion
>>> diffusion.generate.__name__
'generate'
"""

from importlib import import_module
from types import ModuleType

LOOPS = ("diffusion", "self_speculative", "speculative")


def __getattr__(name: str) -> ModuleType:
    if name in LOOPS:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
