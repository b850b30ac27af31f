"""Public calls of rejection_sample_tree launch only what the static report compiles."""

import pytest
from test_static_report import run

pytest.importorskip("triton", reason="the static report compiles with Triton")

COVERAGE = """
import torch
import pydecode
from pydecode.bench.static.launches import recorded, uncovered
from pydecode.bench.static.targets import TARGETS
from pydecode.triton_kernels.rejection_sample_tree import rejection_sample_tree
from pydecode.schemas import argument_names
NAMES = argument_names("rejection_sample_tree")[:-1]
B, T, V, bf16 = 2, 64, 128256, torch.bfloat16
seeds, parents = torch.zeros(B, dtype=torch.int64), torch.zeros(1, T, dtype=torch.int64)
tokens = torch.zeros(B, T, dtype=torch.int64)
rows = lambda dtype, V=V: torch.zeros(1, 1, V, dtype=dtype).expand(B, T, V)
def call(rule, **more):
    given = dict.fromkeys(NAMES)
    given.update(top_k=0, top_p=1.0, min_p=0.0, temperature=1.0, temperature_tensor=torch.ones(B),
        draft_temperature=1.0, draft_temperature_tensor=torch.ones(B), filter_draft=True,
        num_drafts=T - 1, max_depth=8, threshold_single=1.0, threshold_acc=1.0, seed=0,
        seed_tensor=seeds, offset=0, positions=0, positions_tensor=seeds, rule=rule,
        return_logprobs=False, draft_tokens=tokens, parents=parents)
    given.update(more)
    rejection_sample_tree(*(given[name] for name in NAMES))
plain = dict(target_logits=rows(bf16), draft_logits=rows(bf16))
some = torch.ones(B)
filtered = dict(top_k=0, top_k_tensor=some, top_p_tensor=some, min_p_tensor=some)
calls = {
    "recursive": lambda: call("recursive", **plain),
    "k_seq": lambda: call("k_seq", **plain),
    "deterministic": lambda: call("recursive", target_logits=rows(bf16)),
    "probabilities": lambda: call("target_only", target_probs=rows(torch.float32)),
    "reduced": lambda: call("without_replacement", target_logits=rows(bf16),
        draft_logits=rows(bf16, 32000), draft_vocab=torch.zeros(32000, dtype=torch.int64),
        **filtered, filter_draft=True),
    "traversal": lambda: call("traversal", **plain),
}
from pydecode.triton_kernels import law_prepare
for name, made in calls.items():
    with recorded() as launches:
        made()
    for target in ("sm_80", "sm_90"):
        modules = [f"pydecode.triton_kernels.{x}" for x in ("rejection_sample_tree", "law_prepare")]
        missing = uncovered(launches, TARGETS[target], *modules)
        assert not missing, (name, target, missing)
print("covered")
"""


def test_public_calls_stay_within_the_report() -> None:
    done = run(["-c", COVERAGE])
    assert done.stdout.strip() == "covered", done.stderr[-3000:]
