"""Triton kernels on CPU tensors: only where TRITON_INTERPRET=1 was set before Triton's import.

``make test-triton`` runs this folder with it; elsewhere its tests are skipped.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))  # NaN in numpy
            if os.environ.get("TRITON_INTERPRET") != "1":
                item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1"))


@pytest.fixture(autouse=True, scope="session")
def _patched_once_a_launch() -> Iterator[None]:
    """The interpreter patches triton.language anew at each call of a device function, which is half
    of its time; once a launch and module is enough."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    seen = set()

    def once(fn: Any) -> Any:
        if fn.__module__ in seen:
            return None
        seen.add(fn.__module__)
        return patch(fn)

    def start(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.clear()
        return launch(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as change:
        change.setattr(interpreter, "_patch_lang", once)
        change.setattr(interpreter.GridExecutor, "__call__", start)
        yield


@pytest.fixture(autouse=True)
def _nothing_replayed() -> None:
    """Of earlier tests: each makes its own calls, whatever it puts in the kernels' places."""
    from pydecode import replay

    replay.forget()
