"""Public calls of the cache, tree and integer ops launch only what the static report compiles."""

import pytest
from test_static_report import run

pytest.importorskip("triton", reason="the static report compiles with Triton")

COVERAGE = """
import torch
from pydecode.bench.static.launches import recorded, uncovered
from pydecode.bench.static.targets import TARGETS
from pydecode.triton_kernels import (
    commit_kv, dynamic_tree, jacobi_step, mask_from_parents, pack_mask, remask, verify_states,
    write_kv,
)
BF16, FP8, I32 = torch.bfloat16, torch.float8_e4m3fn, torch.int32
pool = torch.zeros(2, 3, 9, 16, 8, 128, dtype=BF16)  # K and V, layers, pages
table, ids = torch.zeros(2, 4, dtype=I32), torch.zeros(2, 5, dtype=I32)
rows, longs = torch.zeros(2, 5, 8, 128, dtype=BF16), torch.zeros(2, 60, dtype=torch.int64)
staging = torch.zeros(3, 2, 5, 8, 128, dtype=BF16)
half, scale = torch.zeros(2, 5, 64), torch.ones(2, 8)
def commit(k, v, *source):
    source = source or (None, None)
    commit_kv.commit_kv(k, v, ids, ids[:, 0], ids[:, 0], table, *source)
def write(cache, *args):
    k_cache, v_cache = pool[0, 0].to(cache), pool[1, 0].to(cache)
    write_kv.write_kv(rows, rows, k_cache, v_cache, ids, table, *args)
calls = {
    "one tensor": lambda: commit([pool[0]], [pool[1]]),
    "a list": lambda: commit(list(pool[0]), list(pool[1])),
    "staged": lambda: commit(list(pool[0]), list(pool[1]), staging, staging),
    "rotated": lambda: write(BF16, half, half, False, rows, 1.0, None, 1.0, None),
    "as it is": lambda: write(BF16, None, None, False, rows, 1.0, None, 1.0, None),
    "fp8": lambda: write(FP8, half, half, False, rows, 1.0, scale, 1.0, scale),
    "masks": lambda: mask_from_parents.mask_from_parents(longs),
    "packing": lambda: pack_mask.pack_mask(torch.ones(2, 64, 64, dtype=torch.bool)),
    "a beam": lambda: dynamic_tree.dynamic_tree(longs.float(), longs, longs, 20),
    "Jacobi": lambda: jacobi_step.jacobi_step(longs, longs, 60, None),
    "states": lambda: verify_states.verify_states(
        longs.view(2, 6, 10), longs.view(2, 6, 10), 0, "subset", None),
    "remask": lambda: remask.remask(longs, longs.float(), 3, None, 0),
}
for name, call in calls.items():
    with recorded() as launches:
        call()
    assert len(launches) == 1, (name, len(launches))
    module = launches[0].kernel.module.removesuffix("_kernel")
    for target in ("sm_80", "gfx942"):
        assert not uncovered(launches, TARGETS[target], module), (name, target)
print("covered")
"""


def test_public_calls_stay_within_the_report() -> None:
    """And each of them is one launch."""
    done = run(["-c", COVERAGE])
    assert done.stdout.strip() == "covered", done.stderr[-2000:]
