"""``python -m pydecode.bench.host_time``: what a call costs the host before its kernels run.

Every op's first quick workload, through the public function with the Triton backend, on CPU tensors
and with the launches themselves left out. Seconds of this thread alone, and as a ratio to one
``torch.empty``, which a loaded machine changes less.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton.runtime.jit import JITFunction

import pydecode
from pydecode import replay
from pydecode.check.report import machine
from pydecode.check.run import public

from .run import ops
from .workload import Workload

backends: Any = import_module("pydecode.backends")  # pydecode.backends is the function
CALLS = 300
TARGET = 15.0  # us, beyond the launches


class HostTime(NamedTuple):
    op: str
    label: str
    us: float
    launches: int
    ratio: float  # to one torch.empty


@contextmanager
def without_kernels() -> Iterator[list[str]]:
    """CPU tensors are taken for a GPU's, and launches are noted and not made."""
    launches: list[str] = []

    def note(self: JITFunction, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        launches.append(self.__name__)

    run, refuse = JITFunction.run, backends.no_triton
    JITFunction.run = note  # type: ignore[method-assign]
    backends.no_triton = lambda *args: ""
    try:
        yield launches
    finally:
        JITFunction.run, backends.no_triton = run, refuse  # type: ignore[method-assign]
        replay.forget()  # of CPU tensors that were taken for a GPU's


def seconds(call: Callable[[], object], rounds: int = 7) -> float:
    """Of one call: the best round's mean, of this thread's own time."""
    best = float("inf")
    for _ in range(rounds):
        begin = time.thread_time()
        for _ in range(CALLS):
            call()
        best = min(best, (time.thread_time() - begin) / CALLS)
    return best


def measure(workload: Workload) -> HostTime | None:
    """None: the op has no Triton kernels for this workload."""
    args, kwargs = workload.make(torch.device("cpu"))

    def call() -> object:
        return public(workload.op)(*args, **kwargs, backend="triton")

    with torch.no_grad(), without_kernels() as launches:  # as engines call
        try:
            call()
        except pydecode.BackendUnavailable:
            return None
        count = len(launches)
        call()  # the second call of a kind is recorded, and then replayed
        took = seconds(call)
    unit = seconds(lambda: torch.empty(64))
    return HostTime(workload.op, workload.label, took * 1e6, count, took / unit)


def first_quick(op: str) -> Workload:
    module = import_module(f"{__package__}.{op}")
    return next(w for w in module.workloads() if w.quick)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("op", nargs="*", help="default: every op with Triton kernels")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if backends._interpreted():
        parser.error("TRITON_INTERPRET is set: there would be nothing but the interpreter")
    rows = []
    print(f"{'op':24} {'us':>7} {'torch.empty':>12} {'launches':>9}   target {TARGET:.0f} us")
    for op in options.op or ops():
        row = measure(first_quick(op))
        if row is not None:
            rows.append(row)
            print(f"{op:24} {row.us:7.1f} {row.ratio:11.0f}x {row.launches:9}   {row.label}")
    if options.json:
        content = dict(kind="host_time", machine=machine("cpu"), rows=[r._asdict() for r in rows])
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
