"""transformers' ``_speculative_sampling``: batch 1, and it synchronises."""

from collections.abc import Callable
from importlib import util
from inspect import signature
from typing import Any

from torch import Tensor

from . import Unsupported

NAME = "transformers"


def missing() -> str:
    return "" if util.find_spec("transformers") else "transformers is not installed"


def reject(target: Tensor, tokens: Tensor, draft: Tensor, **kwargs: Any) -> Callable[[], object]:
    from transformers.generation.utils import _speculative_sampling

    if target.shape[0] != 1 or kwargs["rule"] != "token":
        raise Unsupported("batch 1 and the token rule only")
    G = tokens.shape[1]
    # before 5.23 the fifth argument was required: whether the candidate had ended
    rest = (False,) if "is_done_candidate" in signature(_speculative_sampling).parameters else ()
    return lambda: _speculative_sampling(tokens, draft.float(), G, target.float(), *rest)


OPS = {"rejection_sample": reject}
