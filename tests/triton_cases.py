"""What the random cases of tests/triton share.

``PYDECODE_TEST_MORE=50`` runs fifty times as many of them.
"""

import os
from typing import Any

import torch

MORE = int(os.environ.get("PYDECODE_TEST_MORE", "1"))


def chance(p: float) -> bool:
    return bool(torch.rand(()) < p)


def one_of(*choices: Any) -> Any:
    return choices[int(torch.randint(len(choices), ()))]
