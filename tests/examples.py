"""One small call of every op: (public function, args, kwargs) made afresh by ``EXAMPLES[op]()``.

The binding tests (opcheck, torch.compile, autograd, backends) are made from these.
"""

from collections.abc import Callable
from typing import Any

import torch

import pydecode

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def tree_attention() -> Call:
    q, k, v = torch.randn(2, 5, 4, 16), torch.randn(2, 5, 2, 16), torch.randn(2, 5, 2, 8)
    k_cache, v_cache = torch.randn(7, 4, 2, 16), torch.randn(7, 4, 2, 8)
    return (
        pydecode.tree_attention,
        (q, k_cache, v_cache, k, v),
        dict(
            mask=torch.rand(2, 5, 5) < 0.5,
            cache_seqlens=torch.tensor([3, 9]),
            block_table=torch.tensor([[3, 1, 5], [2, 0, 6]]),
            return_lse=True,
        ),
    )


def block_attention() -> Call:
    q, k, v = torch.randn(2, 5, 4, 16), torch.randn(2, 5, 2, 16), torch.randn(2, 5, 2, 8)
    k_cache, v_cache = torch.randn(7, 4, 2, 16), torch.randn(7, 4, 2, 8)
    return (
        pydecode.block_attention,
        (q, k_cache, v_cache, k, v),
        dict(
            cache_seqlens=torch.tensor([12, 9]),
            replace_at=torch.tensor([4, -1]),
            cache_starts=1,
            causal=torch.tensor([False, True]),
            block_table=torch.tensor([[3, 1, 5], [2, 0, 6]]),
            num_tokens=torch.tensor([5, 3]),
            sinks=torch.randn(4),
            return_lse=True,
        ),
    )


def branch_attention() -> Call:
    q, k, v = torch.randn(2, 3, 4, 4, 16), torch.randn(2, 3, 4, 2, 16), torch.randn(2, 3, 4, 2, 8)
    k_cache, v_cache = torch.randn(2, 12, 2, 16), torch.randn(2, 12, 2, 8)
    return (
        pydecode.branch_attention,
        (q, k_cache, v_cache, k, v),
        dict(
            cache_seqlens=torch.tensor([12, 9], dtype=torch.int32),
            replace_at=4,
            num_branches=torch.tensor([3, 2]),
            window_size=3,
            positions=torch.arange(4).expand(2, 1, 4) + 4,
            softcap=5.0,
            return_lse=True,
        ),
    )


def ranked_attention() -> Call:
    q, k, v = torch.randn(9, 4, 16), torch.randn(12, 2, 16), torch.randn(12, 2, 8)
    return (
        pydecode.ranked_attention,
        (q, k, v),
        dict(
            q_rank=pydecode.ranks.block_causal(9, 2)[0],
            k_rank=pydecode.ranks.block_causal(12, 2)[0],
            mask=torch.randint(0, 1 << 7, (9, 1)),
            cu_seqlens_q=torch.tensor([0, 4, 9]),
            cu_seqlens_k=torch.tensor([0, 5, 12]),
            max_seqlen_q=5,
            max_seqlen_k=7,
            return_lse=True,
        ),
    )


def merge_states() -> Call:
    return (
        pydecode.merge_states,
        (torch.randn(3, 2, 5, 4, 16), torch.randn(3, 2, 4, 5)),
        dict(
            temperatures=torch.tensor([1.0, 0.9, 0.8]),
            scales=torch.tensor([1.0, 1.0, 0.7]),
            mask=torch.rand(2, 5) < 0.7,
            log_base=2.0,
        ),
    )


def commit_kv() -> Call:
    pool = torch.randn(2, 7, 2, 4, 2, 8)  # layers, pages, K and V interleaved
    return (
        pydecode.commit_kv,
        (
            [pool[0, :, 0], pool[1, :, 0]],
            [pool[0, :, 1], pool[1, :, 1]],
            torch.tensor([[0, 2, 3, -1], [-1, -1, -1, -1], [0, 4, -1, -1]], dtype=torch.int32),
            torch.tensor([2, 0, 1], dtype=torch.int32),
        ),
        dict(
            cache_seqlens=torch.tensor([3, 5, 0]),
            block_table=torch.tensor([[0, 1], [2, 3], [5, 4]]),
        ),
    )


def write_kv() -> Call:
    k, v, q = torch.randn(2, 3, 2, 8), torch.randn(2, 3, 2, 4), torch.randn(2, 3, 4, 8)
    k_cache = torch.zeros(5, 4, 2, 8)  # not fp8: opcheck cannot compare it
    v_cache = torch.zeros(5, 2, 4, 4).transpose(1, 2)  # HND
    return (
        pydecode.write_kv,
        (k, v, k_cache, v_cache),
        dict(
            positions=torch.tensor([[0, 5, -1], [3, 2, 9]]),
            block_table=torch.tensor([[3, 1], [2, 0]]),
            cos=torch.rand(2, 3, 3),
            sin=torch.rand(2, 3, 3),
            interleaved=True,
            q=q,
            k_scale=torch.tensor([0.5, 2.0]),
        ),
    )


def jacobi_step() -> Call:
    draft = torch.tensor([[7, 1, 2, 3], [7, 1, 2, 3], [4, 4, 4, 4]], dtype=torch.int32)
    target = torch.tensor([[1, 2, 5, 6], [1, 2, 3, 4], [5, 4, 4, 4]])
    return pydecode.jacobi_step, (draft, target), dict(num_valid=torch.tensor([3, 4, 4]))


def verify_states() -> Call:
    states, targets = torch.randint(0, 3, (2, 4, 2)), torch.randint(0, 3, (2, 4, 2))
    graph = torch.ones(1, 4, 4, dtype=torch.bool)
    return (
        pydecode.verify_states,
        (states, targets),
        dict(mask_id=0, rule="subset", graph=graph),
    )


def pack_mask() -> Call:
    return pydecode.trees.pack_mask, (torch.rand(2, 67, 67) < 0.5,), {}


def mask_from_parents() -> Call:
    # a valid tree, a forest, and parents that end a walk
    parents = torch.tensor([[-1, 0, 0, 1, 3], [-1, -1, 1, 0, 2], [0, 9, 1, 4, -7]])
    return pydecode.trees.mask_from_parents, (parents,), {}


def tree_depths() -> Call:
    parents = torch.tensor([[-1, 0, 0, 1, 3], [0, 9, 1, 4, -7]], dtype=torch.int32)
    return pydecode.trees.depths, (parents,), {}


def dynamic_tree() -> Call:
    return (
        pydecode.trees.dynamic,
        (
            torch.tensor([[0.0, -0.5, -1.0, -2.0, -0.6], [0.0, -1.0, -0.1, -0.1, -3.0]]),
            torch.tensor([[7, 3, 4, 5, 6], [7, 3, -1, 5, 6]]),
            torch.tensor([[-1, 0, 0, 1, 1], [-1, 0, 0, 2, 1]]),
        ),
        dict(num_nodes=4, max_depth=2),
    )


def tree_from_links() -> Call:
    # lists out of index order; a cycle, a link out of range, one to itself and a node in two lists
    first_child = torch.tensor([[3, -1, -1, 1, -1], [2, 7, 3, 1, 4]], dtype=torch.int32)
    next_sibling = torch.tensor([[-1, 4, -1, 2, -1], [4, 3, 1, -9, 2]])
    return pydecode.trees.from_links, (first_child, next_sibling), {}


def tree_links() -> Call:
    parents = torch.tensor([[-1, 0, 0, 1, 0], [0, 9, 1, 4, -7]], dtype=torch.int32)
    return pydecode.trees.links, (parents,), {}


def verify_greedy() -> Call:
    return (
        pydecode.verify_greedy,
        (torch.tensor([[0, 3, 5, 3, 8], [0, 1, 2, 6, 9]]), torch.randn(7, 10)),
        dict(
            parents=torch.tensor([[-1, 0, 0, 1, 3]]),
            num_drafts=torch.tensor([4, 3]),
            max_depth=3,
            rule="typical",
            posterior_threshold=0.05,
            temperature=torch.tensor([0.7, 0.0]),
            row_index=torch.tensor([[0, 1, 2, 3, 4], [5, 6, 0, 1, -1]]),
            allowed=torch.full((2, 5, 1), 0x1FF, dtype=torch.int32),
            first_match=True,
        ),
    )


def rejection_sample() -> Call:
    return (
        pydecode.rejection_sample,
        (torch.randn(9, 12), torch.tensor([[3, 11, 5], [1, 2, -1]]), torch.randn(2, 3, 8)),
        dict(
            num_drafts=torch.tensor([3, 2]),
            row_index=torch.tensor([[0, 1, 2, 3], [4, 8, 6, -1]]),
            draft_vocab=torch.tensor([1, 2, 3, 4, 5, 6, 7, 11]),
            allowed=torch.full((2, 4, 1), 0xFFE, dtype=torch.int32),
            temperature=torch.tensor([0.9, 0.0]),
            top_k=10,
            top_p=torch.tensor(0.95),
            draft_temperature=1.3,
            filter_draft=False,
            rule="block",
            seed=torch.tensor([5, -7]),
            offset=2**64 - 1,
            positions=torch.tensor([17, 4]),
            return_logprobs=True,
            return_num_passed=True,
        ),
    )


def sample_and_score() -> Call:
    return (
        pydecode.sample_and_score,
        (torch.randn(5, 11),),
        dict(
            row_index=torch.tensor([[4, 0, -1], [2, 2, 1]], dtype=torch.int32),
            filter_order="joint",
            bias_ids=torch.tensor([[[3, 3]], [[-1, 7]]]).expand(2, 3, 2),
            bias=torch.randn(2, 3, 2),
            temperature=torch.tensor([0.7, 0.0]),
            top_k=torch.tensor([5, 0]),
            top_p=0.9,
            min_p=0.01,
            confidence="neg_entropy",
            tempered=True,
            exclude_ids=[3, 10],
            allowed=torch.tensor([[[0x7FF]] * 3, [[0x0F8]] * 3], dtype=torch.int32),
            sampler="gumbel",
            seed=torch.tensor([5, 2**40 + 1]),
            offset=7,
            positions=torch.tensor([[4, 5, 6], [0, 1, 2]]),
        ),
    )


def unmask() -> Call:
    return (
        pydecode.unmask,
        (torch.tensor([[1, 9, 9, 9, 9, 9], [9, 2, 9, 3, 9, 9]]), 3 * torch.randn(2, 5, 10)),
        dict(
            mask_id=9,
            rule="threshold",
            shift=1,
            window=(torch.tensor([1, 2]), 4),
            threshold=torch.tensor([0.5, 0.6]),
            slack=1e-5,
            max_commit=3,
            temperature=0.8,
            exclude_ids=torch.tensor([0, -1]),
            top_p=0.9,
            filter_order="joint",
            bias_ids=torch.randint(-1, 10, (2, 5, 3)),
            bias=torch.randn(2, 5, 3),
            masked=torch.rand(2, 6) < 0.7,
            return_proposals=True,
            seed=11,
            offset=torch.tensor(2),
        ),
    )


def commit() -> Call:
    return (
        pydecode.commit,
        (
            torch.tensor([[9, 9, 1, 9, 9], [9, 0, 9, 9, 9]]),
            torch.tensor([[1, 2, 3, -1, 5], [9, 7, 6, 5, 4]], dtype=torch.int32),
            torch.rand(2, 5),
        ),
        dict(mask_id=9, rule="posterior", window=(1, 4), keep=torch.tensor(0.5), seed=3),
    )


def remask() -> Call:
    return (
        pydecode.remask,
        (torch.tensor([[1, 9, 2, 3], [9, 9, 9, 4]]), torch.rand(2, 4)),
        dict(r=torch.tensor([2, 3]), mask_id=9),
    )


def earn_credit() -> Call:
    return (
        pydecode.earn_credit,
        (
            torch.tensor([[[4, -1], [2, 3]], [[1, 2], [-1, -1]]], dtype=torch.int32),
            torch.tensor([[[0.5, 0.0], [2.0, 1.0]], [[0.3, 0.2], [0.0, 0.0]]]),
            torch.tensor([[4, 9], [3, -1]]),
            torch.tensor([[0.9, 0.5], [0.8, -torch.inf]]),
        ),
        dict(alive=torch.tensor([[False, True], [False, False]]), gamma=0.3),
    )


def soft_embed() -> Call:
    return (
        pydecode.soft_embed,
        (torch.randn(2, 3, 7), torch.randn(8, 4)),
        dict(mask_id=7, top_p=torch.tensor([0.8, 1.0]), ratio=0.5),
    )


def coupled_accept() -> Call:
    draft = torch.randn(2, 4, 11)
    tokens = pydecode.sample_and_score(draft, temperature=0.9, sampler="gumbel", seed=5).tokens
    return (
        pydecode.coupled_accept,
        (draft, torch.randn(2, 4, 11), tokens),
        dict(ratio=torch.tensor([0.5, 0.8]), temperature=0.9, seed=5),
    )


def rejection_sample_tree() -> Call:
    probs = torch.rand(12, 40)
    return (
        pydecode.rejection_sample_tree,
        (
            None,
            torch.tensor([[0, 3, 7, 3, 5], [1, 9, 9, 2, 50]]),
            torch.tensor([[-1, 0, 0, 1, 2]]),
        ),
        dict(
            draft_logits=torch.randn(9, 12),
            target_probs=probs,
            max_depth=2,
            rule="traversal",
            num_drafts=torch.tensor([4, 3]),
            row_index=torch.tensor([[0, 4, 2, 11, 1], [5, 6, 7, -1, 9]]),
            draft_row_index=torch.tensor([[3, 4, 5, 6, 7], [8, 0, 1, 2, -1]]),
            draft_vocab=torch.arange(12),
            allowed=torch.full((2, 5, 2), -1, dtype=torch.int32),
            temperature=torch.tensor([1.0, 0.0]),
            draft_temperature=0.7,
            top_p=0.9,
            filter_draft=False,
            seed=torch.tensor([3, 4]),
            positions=17,
            return_logprobs=True,
        ),
    )


EXAMPLES: dict[str, Callable[[], Call]] = {
    "verify_greedy": verify_greedy,
    "rejection_sample": rejection_sample,
    "tree_attention": tree_attention,
    "block_attention": block_attention,
    "branch_attention": branch_attention,
    "ranked_attention": ranked_attention,
    "merge_states": merge_states,
    "commit_kv": commit_kv,
    "jacobi_step": jacobi_step,
    "verify_states": verify_states,
    "write_kv": write_kv,
    "pack_mask": pack_mask,
    "mask_from_parents": mask_from_parents,
    "tree_depths": tree_depths,
    "dynamic_tree": dynamic_tree,
    "tree_from_links": tree_from_links,
    "tree_links": tree_links,
    "sample_and_score": sample_and_score,
    "unmask": unmask,
    "commit": commit,
    "remask": remask,
    "earn_credit": earn_credit,
    "soft_embed": soft_embed,
    "coupled_accept": coupled_accept,
    "rejection_sample_tree": rejection_sample_tree,
}
