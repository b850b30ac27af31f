"""Fresh inputs in every run: the seed is printed, and PYDECODE_TEST_SEED repeats it."""

import os
import random

import pytest
import torch

# Set before xdist starts its workers, so that all of them agree.
SEED = int(os.environ.setdefault("PYDECODE_TEST_SEED", str(random.SystemRandom().randrange(2**31))))


def pytest_report_header(config: pytest.Config) -> str:
    return f"PYDECODE_TEST_SEED={SEED}"


@pytest.fixture(autouse=True)
def _fresh_inputs(request: pytest.FixtureRequest) -> None:
    """Each test draws its own inputs from the run's seed and its own name."""
    torch.manual_seed(SEED ^ (hash_of(request.node.nodeid) & 0x7FFFFFFF))


def hash_of(text: str) -> int:
    """A hash that is equal in every process (``hash`` is not)."""
    value = 2166136261
    for byte in text.encode():
        value = (value ^ byte) * 16777619 & 0xFFFFFFFF
    return value


@pytest.fixture(params=["reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that has landed."""
    return request.param
