"""Triton kernels on CPU tensors: only where TRITON_INTERPRET=1 was set before Triton's import.

``make test-triton`` runs this folder with it; elsewhere its tests are skipped.
"""

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))  # NaN in numpy
            if os.environ.get("TRITON_INTERPRET") != "1":
                item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1"))
