"""The adapters of ``pydecode.compat.flashinfer``: see adapters.py."""

from typing import Any

import torch
from adapters import Adapter, Call

from pydecode.compat import flashinfer


def chain(batch: int, **draws: Any) -> Call:
    p, q = torch.rand(batch, 4, 30).softmax(-1), torch.rand(batch, 3, 30).softmax(-1)
    ids = torch.randint(-1, 30, (batch, 3), dtype=torch.int32)
    counters = [torch.zeros(batch, dtype=torch.int32) for _ in range(2)]
    return flashinfer.chain_speculative_sampling, (q, ids, p, *counters), draws


def seeded_chain(batch: int) -> Call:
    return chain(batch, seed=torch.arange(batch), offset=torch.tensor([7]))


def top_k_top_p(batch: int) -> Call:
    given = dict(indices=torch.randint(3, (batch,)), filter_apply_order="joint")
    top_k, top_p = torch.randint(1, 30, (batch,), dtype=torch.int32), torch.rand(batch)
    return flashinfer.top_k_top_p_sampling_from_logits, (torch.randn(3, 30), top_k, top_p), given


def logits(batch: int) -> Call:
    return flashinfer.sampling_from_logits, (torch.randn(batch, 30),), dict(seed=3, offset=batch)


def probs(batch: int) -> Call:
    return flashinfer.sampling_from_probs, (torch.rand(batch, 30),), dict(return_valid=True)


def states(batch: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(batch, 2, 8), torch.randn(batch, 2)


def merge_states(batch: int) -> Call:
    return flashinfer.merge_states, (torch.randn(batch, 3, 2, 8), torch.randn(batch, 3, 2)), {}


def merge_in_place(batch: int) -> Call:
    mask = torch.arange(batch) % 2 == 0
    return flashinfer.merge_state_in_place, (*states(batch), *states(batch)), dict(mask=mask)


def prefill(
    q: torch.Tensor, cache: torch.Tensor, lists: tuple[torch.Tensor, ...], **rule: Any
) -> Any:
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(q.new_empty(0))
    wrapper.plan(*lists, 2, 1, 8, 4, q_data_type=q.dtype, **rule)
    return wrapper.run(q, cache, return_lse=True)


def plan(q: torch.Tensor, cache: torch.Tensor, lists: tuple[torch.Tensor, ...], **rule: Any) -> Any:
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(q.new_empty(0))
    wrapper.plan(*lists, 2, 1, 8, 4, q_data_type=q.dtype, **rule)
    return wrapper._state.table


def first_run(wrapper: Any, q: torch.Tensor, cache: torch.Tensor) -> Any:
    """As after a plan: the mask's rows are read anew."""
    wrapper._state._rows.clear()
    return wrapper.run(q, cache)


def paged_prefill(batch: int, masked: bool = False) -> Call:
    """Three rows over ten keys each."""
    each = torch.arange(batch + 1, dtype=torch.int32)
    lists = (3 * each, 3 * each, torch.arange(3 * batch, dtype=torch.int32), each[1:] * 0 + 2)
    rule = dict(custom_mask=torch.ones(30 * batch, dtype=torch.bool)) if masked else {}
    return (
        prefill,
        (torch.randn(3 * batch, 2, 8), torch.randn(3 * batch, 2, 4, 1, 8), lists),
        rule | dict(max_token_per_sequence=3, max_sequence_kv=12, causal=True),
    )


def planned_prefill(batch: int, masked: bool = False, return_lse: bool = False) -> Call:
    _, (q, cache, lists), rule = paged_prefill(batch, masked)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(q.new_empty(0))
    wrapper.plan(*lists, 2, 1, 8, 4, q_data_type=q.dtype, **rule)
    return wrapper.run, (q, cache), dict(return_lse=return_lse)


def prefill_plan(batch: int, masked: bool = False) -> Call:
    return plan, *paged_prefill(batch, masked)[1:]


def first_masked_run(batch: int) -> Call:
    run, args, _ = planned_prefill(batch, True)
    return first_run, (run.__self__, *args), {}  # type: ignore[attr-defined]


HOST = "plan is outside of graphs, as the peer's is"
OWN = "what a plan left does not move with the arguments"

CALLS: dict[str, Adapter] = {
    "chain_speculative_sampling": Adapter(chain),
    "chain_speculative_sampling, seeded": Adapter(seeded_chain),
    "top_k_top_p_sampling_from_logits": Adapter(top_k_top_p),
    "sampling_from_logits": Adapter(logits),
    "sampling_from_probs": Adapter(probs),
    "merge_state": Adapter(lambda n: (flashinfer.merge_state, (*states(n), *states(n)), {})),
    "merge_states": Adapter(merge_states),
    "merge_state_in_place": Adapter(merge_in_place),
    # page lists are converted by a plan, and a mask's rows by the first run after it
    "prefill, plan": Adapter(prefill_plan, budget=60.0, not_compiled=HOST),
    "prefill, masked plan": Adapter(
        lambda n: prefill_plan(n, masked=True), budget=60.0, not_compiled=HOST
    ),
    "prefill, plan and run": Adapter(paged_prefill, budget=60.0, not_compiled=HOST),
    "prefill, first masked run": Adapter(
        first_masked_run, budget=60.0, not_compiled=OWN, reads_data=OWN
    ),
    "prefill, run": Adapter(planned_prefill, reads_data=OWN),
    "prefill, masked run": Adapter(lambda n: planned_prefill(n, True), reads_data=OWN),
    "prefill, run with lse": Adapter(lambda n: planned_prefill(n, return_lse=True), reads_data=OWN),
}
