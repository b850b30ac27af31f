"""Public calls of chain and greedy verification launch what the static report compiles, and few."""

import pytest
from test_static_report import run

pytest.importorskip("triton", reason="the static report compiles with Triton")

COVERAGE = """
import sys, torch, pydecode
backends = sys.modules["pydecode.backends"]
from pydecode.bench.static.launches import recorded
backends.no_triton = lambda *_: ""  # CPU tensors are let in, for nothing runs
V = 9001
logits, ids = torch.zeros(2, 5, V, dtype=torch.bfloat16), torch.zeros(2, 4, dtype=torch.int64)
each, tree = torch.ones(2), torch.tensor([[-1, 0, 0, 1, 1]])
chain = lambda *args, **kwargs: pydecode.rejection_sample(*args, **kwargs, backend="triton")
greedy = lambda *args, **kwargs: pydecode.verify_greedy(*args, **kwargs, backend="triton")
nodes = torch.zeros(2, 5, dtype=torch.int64)
calls = {
    "chain": (2, lambda: chain(logits, ids, logits[:, :4])),
    "deltas": (2, lambda: chain(logits, ids, return_logprobs=True)),
    "filters": (3, lambda: chain(logits, ids, logits[:, :4], top_k=5, top_p=each)),
    "one filtered": (3, lambda: chain(logits, ids, logits[:, :4], top_p=0.9, filter_draft=False)),
    "blocks": (3, lambda: chain(logits, ids, logits[:, :4], rule="block")),
    "reduced": (3, lambda: chain(
        logits, ids, logits[:, :4, :100], draft_vocab=torch.arange(100), seed=each.long())),
    "exact": (2, lambda: greedy(nodes, logits, parents=tree)),
    "typical": (3, lambda: greedy(nodes, logits, parents=tree, rule="typical")),
    "ids": (1, lambda: greedy(ids, nodes)),
    "coupled": (2, lambda: pydecode.coupled_accept(logits, logits, nodes, backend="triton")),
}
for name, (most, call) in calls.items():
    with recorded() as launches:
        call()
    assert len(launches) == most, (name, len(launches))
print("counted")
"""


def test_few_launches() -> None:
    done = run(["-c", COVERAGE])
    assert done.stdout.strip() == "counted", done.stderr[-2000:]
