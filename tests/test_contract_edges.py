"""Edges of the contract that an audit found broken: each was wrong once."""

import pytest
import torch

import pydecode
from pydecode import ranks, trees


def test_results_are_contiguous_for_transposed_tokens() -> None:
    """Inductor trusts the fake implementation's strides."""
    tokens = torch.full((5, 2), 3).T
    done = pydecode.unmask(tokens, torch.randn(2, 5, 9), mask_id=3)
    again = pydecode.commit(tokens, torch.zeros_like(tokens), torch.rand(5, 2).T, mask_id=3)
    assert all(x.is_contiguous() for x in (*done, *again))


def test_lse_of_one_branch_has_the_fakes_strides() -> None:
    q, cache = torch.randn(2, 1, 3, 4, 8), torch.randn(2, 6, 4, 8)
    _, lse = pydecode.branch_attention(q, cache, cache, q, q, cache_seqlens=6, return_lse=True)
    assert lse.stride() == torch.empty(2, 1, 4, 3).stride()


@pytest.mark.parametrize("min_p", [1.5, torch.tensor([2.0]), torch.tensor([torch.nan])])
def test_min_p_above_1_or_nan_leaves_the_support_alive(min_p: object) -> None:
    x = torch.randn(1, 2, 5)
    scores = pydecode.sample_and_score(x, exclude_ids=[0], temperature=1.0, min_p=min_p)
    assert (scores.tokens > 0).all()
    done = pydecode.unmask(
        torch.zeros(1, 2, dtype=torch.int64), x, mask_id=0, temperature=1.0, min_p=min_p
    )
    assert done.tokens[done.committed].min() > 0
    verified = pydecode.rejection_sample(x, torch.tensor([[1]]), min_p=min_p)
    assert verified.tokens[0, 0] >= 0


@pytest.mark.parametrize("op", [pydecode.tree_attention, pydecode.block_attention])
def test_a_strided_out_compiles(op: object) -> None:
    q, kv, cache = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8), torch.randn(2, 9, 4, 8)

    def call(q: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return op(q, cache, cache, kv, kv, cache_seqlens=5, out=out[:, :, ::2])  # type: ignore[operator]

    want, got = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    call(q, want)
    torch._dynamo.reset()
    torch.compile(call, fullgraph=True, backend="aot_eager")(q, got)
    assert torch.equal(got, want)


def test_out_is_returned_itself() -> None:
    q, cache = torch.randn(1, 2, 2, 8), torch.randn(1, 4, 2, 8)
    out = torch.empty(1, 2, 2, 8, requires_grad=True)
    with torch.no_grad():
        assert pydecode.tree_attention(q, cache, cache, q, q, cache_seqlens=4, out=out) is out


def test_no_ids_to_exclude() -> None:
    x = torch.randn(2, 4, 10)
    want = pydecode.sample_and_score(x).tokens
    for shape in ((0,), (2, 0)):
        empty = torch.empty(shape, dtype=torch.int64)
        assert torch.equal(pydecode.sample_and_score(x, exclude_ids=empty).tokens, want)


def test_greedy_takes_the_argmax_of_probabilities_as_given() -> None:
    """Neighbours in fp32 that a division by the sum would merge."""
    p = torch.tensor(
        [float.fromhex(x) for x in ("0x1.bd7538p-2", "0x1.6fc358p-2", "0x1.bd753ap-2")]
    )
    done = pydecode.rejection_sample(
        None, torch.tensor([[2]]), target_probs=p.expand(1, 2, 3), temperature=0.0
    )
    assert done.tokens.tolist() == [[2, 2]]


@pytest.mark.parametrize("temperature", [1e-38, torch.inf])
def test_logprobs_at_extreme_temperatures(temperature: float) -> None:
    logits = torch.randn(1, 2, 10) * 10
    logits[..., 3] = -torch.inf
    done = pydecode.rejection_sample(
        logits, torch.tensor([[1]]), temperature=temperature, return_logprobs=True
    )
    assert done.logprobs is not None
    assert done.logprobs.isfinite().all()


def test_numbers_that_are_static_refuse_tensors() -> None:
    logits, drafts = torch.zeros(1, 2, 10), torch.tensor([[5]])
    for name in ("distance", "posterior_threshold", "posterior_alpha"):
        with pytest.raises(TypeError, match=f"{name}: expected .*got Tensor"):
            pydecode.verify_greedy(drafts, logits, **{name: torch.tensor(2)})


def test_a_tree_keeps_its_depth_bound() -> None:
    tree = trees.from_choices([(0,), (1,)])
    assert tree._replace(choice=tree.choice).max_depth == tree.max_depth == 1
    assert trees.Tree._make(tuple(tree)).max_depth == 2  # T - 1, also right


def test_checks_see_the_pages_of_a_commit() -> None:
    caches = torch.zeros(1, 2, 4, 1, 2)
    with pydecode.checks(True), pytest.raises(ValueError, match=r"block_table: .*got 7 at index"):
        pydecode.commit_kv(
            *(caches, caches.clone(), torch.tensor([[0, 2]]), torch.tensor([1])),
            cache_seqlens=torch.tensor([1]),
            block_table=torch.tensor([[7]]),
        )


@pytest.mark.parametrize("lengths", [[1.5], None, "3"])
def test_lengths_of_ranks_are_ints(lengths: object) -> None:
    with pytest.raises(TypeError, match="lengths: expected ints"):
        ranks.bidirectional(lengths, 3)  # type: ignore[arg-type]
