"""Work in other processes: a compiler that crashes takes none of the report with it."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any


@contextmanager
def fresh_compiler() -> Iterator[None]:
    """Processes started inside see an empty compile cache of their own, and no interpreter."""
    kept = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="static_report_") as folder:
        try:
            os.environ["TRITON_CACHE_DIR"] = folder
            os.environ["OMP_NUM_THREADS"] = "1"
            os.environ["PYTHONWARNINGS"] = "ignore"
            for name in ("TRITON_INTERPRET", "TRITON_KERNEL_OVERRIDE"):
                os.environ.pop(name, None)
            yield
        finally:
            os.environ.clear()
            os.environ.update(kept)


def each(
    work: Sequence[tuple[Callable[..., Any], tuple]], jobs: int
) -> Iterator[tuple[int, Any | None]]:
    """Index and result of each piece of work, as they end; None where the process died."""
    left = dict(enumerate(work))
    try:
        with _executor(jobs) as executor:
            running: dict[Future, int] = {
                executor.submit(function, *arguments): i
                for i, (function, arguments) in left.items()
            }
            for future in as_completed(running):
                result = future.result()
                del left[running[future]]
                yield running[future], result
    except BrokenProcessPool:
        yield from _one_by_one(left)


def _one_by_one(left: dict[int, tuple[Callable[..., Any], tuple]]) -> Iterator[tuple[int, Any]]:
    """After a crash: which of them was it."""
    executor = _executor(1)
    for i, (function, arguments) in left.items():
        try:
            yield i, executor.submit(function, *arguments).result()
        except BrokenProcessPool:
            executor = _executor(1)
            yield i, None
    executor.shutdown()


def _executor(jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
