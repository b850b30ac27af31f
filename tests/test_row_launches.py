"""What the diffusion ops launch in Triton: how often, and only what the static report compiles.

Nothing runs: launches are recorded, on CPU tensors, for each architecture.
"""

import importlib
import os
from typing import Any

import pytest
import torch
from torch import Tensor

import pydecode

pytest.importorskip("triton", reason="records Triton launches")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="there is nothing to specialise"
)

B, L, V = 2, 32, 128256
MODULES = tuple(f"pydecode.triton_kernels.{m}" for m in ("row_calls", "commit", "soft_embed"))
SEEDS = torch.tensor([5, 7])


@pytest.fixture(autouse=True)
def _as_if_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = importlib.import_module("pydecode.backends")  # the package has a function so named
    monkeypatch.setattr(backends, "_interpreted", lambda: True)


def launched(op: Any, *args: Any, **kwargs: Any) -> list[Any]:
    from pydecode.bench.static.launches import recorded

    with recorded() as launches:
        op(*args, **kwargs, backend="triton")
    return launches


def logits(dtype: torch.dtype = torch.bfloat16, rows: int = L) -> Tensor:
    return torch.zeros(1, 1, V, dtype=dtype).expand(B, rows, V)


TOKENS = torch.full((B, L), 3)
EACH = torch.ones(B)
CALLS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], int]] = {
    "greedy": (pydecode.sample_and_score, (logits(),), dict(seed=SEEDS), 2),
    "sampled": (
        pydecode.sample_and_score,
        (logits(torch.float32),),
        dict(seed=SEEDS, temperature=EACH, confidence="margin"),
        2,
    ),
    "filtered": (
        pydecode.sample_and_score,
        (logits(),),
        dict(seed=SEEDS, temperature=EACH, top_k=5, top_p=EACH, min_p=0.1, tempered=True,
             confidence="neg_entropy"),
        3,
    ),
    "filtered gumbel": (
        pydecode.sample_and_score,
        (logits(),),
        dict(seed=SEEDS, temperature=EACH, top_k=5, top_p=EACH, min_p=0.1, filter_order="joint",
             sampler="gumbel"),
        3,
    ),
    "unmask": (
        pydecode.unmask,
        (TOKENS, logits()),
        dict(mask_id=3, rule="threshold", seed=SEEDS, temperature=EACH * 0),
        2,
    ),
    "unmask greedy": (pydecode.unmask, (TOKENS, logits()), dict(mask_id=3, seed=SEEDS), 2),
    "unmask filtered": (
        pydecode.unmask,
        (TOKENS, logits()),
        dict(mask_id=3, rule="prefix", seed=SEEDS, temperature=EACH, top_k=5, top_p=EACH, min_p=0.1,
             tempered=True, confidence="neg_entropy"),
        3,
    ),
    "commit": (
        pydecode.commit, (TOKENS, TOKENS + 1, torch.rand(B, L)), dict(mask_id=3, rule="factor"), 1
    ),
    "soft_embed": (
        pydecode.soft_embed,
        (logits(), torch.zeros(1, 64, dtype=torch.bfloat16).expand(V, 64)),
        dict(mask_id=3),
        2,
    ),
    "soft_embed top-p": (
        pydecode.soft_embed,
        (logits(), torch.zeros(1, 64, dtype=torch.bfloat16).expand(V, 64)),
        dict(mask_id=3, top_p=0.9),
        3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_launches(name: str) -> None:
    """One read of the logits and one decision; between them one for the thresholds of filters."""
    op, args, kwargs, count = CALLS[name]
    assert len(launched(op, *args, **kwargs)) == count


@pytest.mark.parametrize("name", [name for name in CALLS if name != "unmask"])
def test_the_static_report_compiles_them(name: str) -> None:
    from pydecode.bench.static.launches import uncovered
    from pydecode.bench.static.targets import TARGETS

    op, args, kwargs, _ = CALLS[name]
    launches = launched(op, *args, **kwargs)
    for target in ("sm_80", "sm_90"):  # the CPU stands for an NVIDIA table
        assert not uncovered(launches, TARGETS[target], *MODULES)


@pytest.mark.parametrize("op", ["sample_and_score", "unmask", "commit"])
def test_one_binary_for_all_batches(op: str) -> None:
    """Batch, length, window, seed and numbers that a server changes never compile anew."""
    from pydecode.bench.static.launches import specialise
    from pydecode.bench.static.targets import TARGETS

    def binaries(B: int, length: int, number: int) -> list[str]:
        tokens, x = torch.full((B, length), 3), torch.zeros(1, 1, 4096).expand(B, length, 4096)
        numbers: dict[str, Any] = dict(seed=number, offset=number)
        if op == "sample_and_score":
            made = launched(pydecode.sample_and_score, x.contiguous(), temperature=0.7, **numbers)
        else:
            numbers |= dict(mask_id=3, k=number % 1000, window=(number % 7, length))
            given = (x.contiguous(),) if op == "unmask" else (tokens, torch.rand(B, length))
            made = launched(getattr(pydecode, op), tokens, *given, **numbers)
        return [specialise(launch, TARGETS["sm_90"]).exact for launch in made]

    first = binaries(3, 5, 1)
    assert binaries(16, 16, 2**40 + 16) == first
    assert binaries(1, 1, 0) == first
    assert binaries(300, 33, -5) == first
