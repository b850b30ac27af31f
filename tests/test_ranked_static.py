"""Ranked attention's launches stay within the static report; its table can be tuned."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels are Triton's")

# sizes, strides and options as servers have them, none of them the report's own
LAUNCHES = """
import torch
from pydecode.bench.static.launches import recorded, uncovered
from pydecode.bench.static.targets import TARGETS
from pydecode.triton_kernels import ranked_attention as module
from pydecode.triton_kernels.ranked_static import BF16, E4M3, FP16, FP32, empty, example
from pydecode.triton_kernels.devices import ARCHITECTURES

def calls():
    yield example(33, page_size=64, window_size=7, positions=empty(8, 33), dtype=FP16)
    for D in (64, 128, 256):
        yield example(777, D)
        yield example(2000, D, FP32)
        scale = empty(8, dtype=FP32)  # [Hkv]
        yield example(5000, D, cache=E4M3, k_scale_tensor=scale, v_scale_tensor=scale)
        for dtype, cache in ((BF16, None), (BF16, E4M3), (FP32, None)):
            more = dict(k_scale_tensor=scale, v_scale_tensor=scale) if cache else {}
            yield example(555, D, dtype, cache=cache, step=3, **more)
            yield example(9, D, dtype, cache=cache, step=3, **more)
    yield example(3000, page_size=16, mask=empty(1, 3000, 64, dtype=torch.int64))
    yield example(300, mask=empty(8, 300, 4096, dtype=torch.bool))
    yield example(1025, packed=True, strict=True, cu_seqlens_q=empty(9))
    yield example(4096, page_size=1, num_tokens=5)
    yield example(1, page_size=64, window_size=100, positions=empty(8, 1), dtype=FP16)

for arch in ARCHITECTURES:
    module.architecture = lambda q: arch
    with recorded() as launches:
        for n, given in enumerate(calls(), 1):
            module.ranked_attention(**given)
            assert len(launches) == 2 * n
    missing = uncovered(launches, TARGETS[arch], module.__name__)
    assert not missing, (arch, missing)
with recorded() as launches:  # and one that it does not hold: 48 heads
    module.ranked_attention(**example(q=empty(8, 4096, 48, 128, dtype=BF16)))
assert uncovered(launches, TARGETS["sm_90"], module.__name__)
print("covered")
"""

TUNING = """
import torch
from pydecode.bench import ranked_attention as bench
from pydecode.triton_kernels import ranked_attention as module
from pydecode.triton_kernels.devices import ARCHITECTURES
table = module.CONFIGURATIONS
for key, own in table.items():
    tried = list(module.candidates(key))
    assert len(tried) > 3 and all(set(c) == set(own) and c["BM"] == own["BM"] for c in tried), key
    for launch in tried:  # the launcher finds a plan for each
        assert key[0] == "plan" or ("plan", launch["BM"], launch["BN"], 1) in table
    workloads = {arch: bench.tuned_by(key, arch) for arch in ARCHITECTURES}
    assert any(workloads.values()), key
    for arch, workload in workloads.items():
        if workload is None:
            assert key[0] == "plan" or key[3] != arch
            continue
        (q, k, v), more = workload.make(torch.device("meta"))
        given = q.dtype, k.dtype == q.dtype, q.shape[-1], q.shape[1], arch
        found = module.key_of(*given, any(map(module.odd, (q, k, v))))
        if key[0] == "plan":
            found = ("plan", table[found]["BM"], table[found]["BN"], int("mask" in more))
        assert found == key, (found, key, arch)
assert bench.tuned_by(next(iter(table))) is None  # no device here
print("tuned")
"""


@pytest.mark.parametrize(("code", "said"), [(LAUNCHES, "covered"), (TUNING, "tuned")])
def test_table(code: str, said: str) -> None:
    """In a process of its own: this one may have loaded Triton's interpreter."""
    keep = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=keep, cwd=Path("/")
    )
    assert done.stdout.strip() == said, done.stderr[-2000:]
