"""What an adapter costs the host beyond the ops that it calls.

The ops are replaced by a look-up of what they returned the first time, and what the look-ups cost
is taken off, so that what is left is the adapter's own: its checks, its reshapes, its launches.
``python tests/compat/host_cost.py`` prints the table, and before and after it how long the machine
takes to add two small tensors: figures of a machine that is busy are longer in proportion.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pydecode
from pydecode.schemas import SCHEMAS

# Public functions that are ops: (where they live, name).
OPS = [
    (place, name)
    for place in (pydecode, pydecode.trees)
    for name in dir(place)
    if callable(getattr(place, name))
    and (name in SCHEMAS or f"tree_{name}" in SCHEMAS or f"{name}_tree" in SCHEMAS)
]


class Remembered:
    """An op that records its calls and results until it is told to replay them, in turn."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self.calls: list[Callable[[], Any]] = []
        self.results: list[Any] = []
        self.turns: Iterator[Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.turns is None:
            self.calls.append(partial(self, *args, **kwargs))
            self.results.append(self.original(*args, **kwargs))
            return self.results[-1]
        return next(self.turns)


@contextmanager
def remembered_ops() -> Iterator[list[Remembered]]:
    """Inside, the public functions that are ops are ``Remembered``."""
    ops = [Remembered(getattr(place, name)) for place, name in OPS]
    try:
        for (place, name), op in zip(OPS, ops):
            setattr(place, name, op)
        yield ops
    finally:
        for (place, name), op in zip(OPS, ops):
            setattr(place, name, op.original)


def host_microseconds(call: Callable[[], Any], *, seconds: float = 0.2) -> float:
    """The fastest of many short runs: what the machine does when nobody disturbs it."""
    with remembered_ops() as ops:
        call()
        used = [op for op in ops if op.calls]
        for op in used:
            op.turns = cycle(op.results)
        looked_up = sum(fastest(one, seconds=seconds / 10) for op in used for one in op.calls)
        for op in used:
            op.turns = cycle(op.results)
        return fastest(call, seconds=seconds) - looked_up


def fastest(call: Callable[[], Any], *, seconds: float) -> float:
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(20):
            call()
        best = min(best, (time.perf_counter() - start) / 20)
    return best * 1e6


def one_launch() -> float:
    """The machine's own speed, in us."""
    x, y = torch.ones(8), torch.ones(8)
    return fastest(lambda: torch.add(x, y), seconds=0.3)


class Launches(TorchDispatchMode):
    """Counts what reaches the dispatcher; a pydecode op is one, and views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and func.overloadpacket is not torch.ops.aten.detach
        return func(*args, **kwargs or {})


def launches(call: Callable[[], Any]) -> int:
    with Launches() as mode:
        call()
    return mode.count


def main() -> None:
    from adapters import ADAPTERS

    torch.set_num_threads(1)
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    print(f"one small launch: {one_launch():.2f} us")
    print(f"{'adapter':56} {'us':>7} {'budget':>7} {'launches':>9}")
    for name, adapter in ADAPTERS.items():
        if wanted in name:
            function, args, kwargs = adapter.make(4)
            cost = host_microseconds(lambda: function(*args, **kwargs), seconds=1.0)  # noqa: B023
            count = launches(lambda: function(*args, **kwargs))  # noqa: B023
            print(f"{name:56} {cost:7.1f} {adapter.budget:7.0f} {count:9}")
    print(f"one small launch: {one_launch():.2f} us")


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    main()
