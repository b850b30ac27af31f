"""pydecode: parallel decoding primitives for PyTorch."""

from .backends import Backend, BackendUnavailable, backends
from .tree_attention import tree_attention
from .validation import checks
from .version import __version__

__all__ = [
    "Backend",
    "BackendUnavailable",
    "__version__",
    "backends",
    "checks",
    "tree_attention",
]
