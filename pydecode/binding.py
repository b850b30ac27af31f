"""Registration of ``pydecode::<op>`` and the way a public function calls it.

Each op is defined once, from ``schemas.SCHEMAS``. ``Library.define`` + ``impl`` costs 3.5 us a call
where ``custom_op`` costs 13 us. The implementation sits at CompositeExplicitAutograd (every
device), and autograd falls through to it: pydecode is forward only.
"""

from collections.abc import Callable
from typing import Any

import torch

from . import replay
from .schemas import OUT_OVERLOADS, SCHEMAS, out_schema

LIBRARY = torch.library.Library("pydecode", "DEF")
# The same pt2 tag that custom_op sets: the op may be handed to Inductor as it is.
_TAGS = (torch.Tag.pt2_compliant_tag,)


def bind(op: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Defines ``pydecode::<op>``; ``run`` and ``fake`` take the schema's arguments in order."""
    LIBRARY.define(op + SCHEMAS[op], tags=_TAGS)
    _implement(op, run, fake)
    return getattr(torch.ops.pydecode, op).default


def bind_out(op: str, run: Callable[..., Any]) -> Any:
    """Defines ``pydecode::<op>.out``; ``run`` gets the results' tensors as keywords."""
    assert op in OUT_OVERLOADS, op
    LIBRARY.define(f"{op}.out" + out_schema(op), tags=_TAGS)
    _implement(f"{op}.out", run, lambda *args, **kwargs: None)
    return getattr(torch.ops.pydecode, op).out


def _implement(name: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    LIBRARY.impl(name, torch.no_grad()(run), "CompositeExplicitAutograd")
    LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"pydecode::{name}", fake, lib=LIBRARY)


def call(op: Any, run: Callable[..., Any], *args: Any, **out: Any) -> Any:
    """Calls the chosen backend directly in eager mode, and the registered op where it is traced.

    Traced means ``torch.compile`` and ``torch.export``, or any dispatch mode (fake tensors,
    make_fx), for which the op must be one opaque node.
    """
    if torch.compiler.is_compiling() or (
        torch._C._len_torch_dispatch_stack() > 0 and not replay.recording()
    ):
        return op(*args, **out)
    if not torch.is_grad_enabled():  # an engine's usual state: the context is a microsecond
        return run(*args, **out)
    with torch.no_grad():
        return run(*args, **out)
