"""After ``warmup`` in Triton a model's calls run no new binary, whatever their batch."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import pydecode
from pydecode import ranks, trees

pytest.importorskip("triton")

from pydecode.bench.host_time import without_kernels
from pydecode.bench.static.launches import recorded, specialise
from pydecode.bench.static.targets import TARGETS

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
HALF, V, Hq, Hkv, D = torch.bfloat16, 32000, 8, 2, 64


def half(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=HALF)


def ids(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def sampled(B: int) -> Iterator[dict[str, Any]]:
    """As engines sample: the defaults, temperatures, and both filters."""
    warm = dict(temperature=torch.ones(B))
    yield {}
    yield warm
    yield dict(warm, top_k=ids(B), top_p=torch.ones(B))


def prefills(B: int) -> Iterator[Call]:
    for n in (5, 64, 200):
        rank = ranks.causal(n)
        given: dict[str, Any] = dict(q_rank=rank, k_rank=rank)
        own = half(B, n, Hkv, D)
        yield pydecode.ranked_attention, (half(B, n, Hq, D), own, own), given
        pages, table = half(99, 16, Hkv, D), ids(B, -(-n // 16))
        given = dict(given, block_table=table, cache_seqlens=ids(B))
        yield pydecode.ranked_attention, (half(B, n, Hq, D), pages, pages), given


def verdicts(B: int, G: int) -> Iterator[Call]:
    tokens, parents = torch.zeros(B, G, dtype=torch.int64), ids(B, G)
    for numbers in sampled(B):
        for rule in ("token", "block"):
            chain = half(B, G + 1, V), tokens, half(B, G, V)
            yield pydecode.rejection_sample, chain, dict(numbers, rule=rule)
        tree = dict(numbers, draft_logits=half(B, G, V))
        yield pydecode.rejection_sample_tree, (half(B, G, V), tokens, parents), tree
        yield pydecode.sample_and_score, (half(B, G, V),), numbers
        given = dict(numbers, mask_id=0, rule="threshold", threshold=0.7)
        yield pydecode.unmask, (tokens, half(B, G, V)), given
    yield pydecode.verify_greedy, (tokens, half(B, G, V)), dict(parents=parents)
    yield pydecode.verify_greedy, (tokens, half(B, G + 1, V)), {}
    yield pydecode.coupled_accept, (half(B, G, V), half(B, G, V), tokens), dict(ratio=0.25)


def others(B: int, n: int) -> Iterator[Call]:
    tokens, scores, parents = torch.zeros(B, n, dtype=torch.int64), torch.zeros(B, n), ids(B, n)
    yield pydecode.jacobi_step, (tokens, tokens), {}
    yield pydecode.remask, (tokens, scores), dict(r=2, mask_id=0)
    given: dict[str, Any] = dict(mask_id=0, rule="threshold", threshold=0.7)
    yield pydecode.commit, (tokens, tokens, scores), given
    yield trees.mask_from_parents, (parents,), {}
    yield trees.pack_mask, (torch.ones(B, n, n, dtype=torch.bool),), {}
    pages, own, angles = half(99, 16, Hkv, D), half(B, n, Hkv, D), half(B, n, D // 2)
    given = dict(positions=tokens, block_table=ids(B, 9), cos=angles, sin=angles)
    yield pydecode.write_kv, (own, own, pages, pages), dict(given, q=half(B, n, Hq, D))
    stack = half(3, 99, 16, Hkv, D)
    given = dict(cache_seqlens=ids(B), block_table=ids(B, 9))
    yield pydecode.commit_kv, (stack, stack, ids(B, n), ids(B)), given


@pytest.fixture(scope="module")
def warm() -> set[str]:
    sizes = dict(num_heads=Hq, num_kv_heads=Hkv, head_dim=D, vocab_size=V)
    cpu: dict[str, Any] = dict(dtype=HALF, device="cpu", backend="triton")
    with without_kernels(), recorded() as launches:
        pydecode.warmup(**sizes, **cpu)
    return {specialise(x, TARGETS["sm_90"]).exact for x in launches}


@pytest.mark.parametrize("B", [1, 2, 3, 16])
def test_no_new_binary(B: int, warm: set[str]) -> None:
    new = set()
    for n in (3, 5, 8):
        for f, args, kwargs in (*prefills(B), *verdicts(B, n), *others(B, n)):
            with without_kernels(), recorded() as launches:
                f(*args, **kwargs, backend="triton")
            made = [specialise(x, TARGETS["sm_90"]).exact for x in launches]
            new |= {(f.__name__, m.split()[0], n) for m in made if m not in warm}
    assert not new
