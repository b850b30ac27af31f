"""The adapters of ``pydecode.compat.transformers``: see adapters.py."""

from adapters import Adapter

CALLS: dict[str, Adapter] = {}
