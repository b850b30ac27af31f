"""The adapters of ``pydecode.compat.vllm``: see adapters.py."""

from typing import Any, NamedTuple

import torch
from adapters import Adapter, Call

from pydecode.compat import vllm

V, G = 50, 3


class Metadata(NamedTuple):
    """A tuple, so that the common tests find its tensors."""

    all_greedy: bool
    all_random: bool
    temperature: torch.Tensor
    generators: dict[int, torch.Generator]


def v1(batch: int, *, seeded: bool = False) -> Call:
    counts = [b % (G + 1) for b in range(batch)]
    N = sum(counts)
    generators = {1: torch.Generator().manual_seed(1)} if seeded else {}
    state = Metadata(False, False, torch.arange(batch) * 0.5, generators)
    args: tuple[Any, ...] = (
        *(torch.randint(0, V, (N,), dtype=torch.int32), counts, G),
        torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32),
        *(torch.rand(N, V), torch.randn(N, V), torch.randint(0, V, (batch, 1)), state),
    )
    return vllm.v1.rejection_sample, args, {}


def v1_seeded(batch: int) -> Call:
    return v1(batch, seeded=True)


def v2(batch: int) -> Call:
    counts = torch.arange(batch) % (G + 1) + 1
    N, R = int(counts.sum()), 2 * batch
    request = torch.repeat_interleave(torch.arange(batch), counts)
    cu = torch.cat([torch.zeros(1).int(), counts.cumsum(0).int()])
    args = (
        *(torch.randn(N, V), torch.randn(R, G, V), torch.randint(0, V, (N,)), cu),
        *(torch.arange(N), torch.randperm(R)[:batch].int(), request.int(), request.int()),
        *(torch.rand(R).round(), torch.arange(R), G),
    )
    return vllm.v2.rejection_sample, args, {"use_block_verification": True}


def attention(batch: int, rows: int = 5, **options: Any) -> Call:
    q, cache = torch.randn(batch * rows, 4, 8), torch.randn(2, 4 * batch, 16, 2, 8)
    args = (
        *(q, cache[0], cache[1], torch.empty_like(q)),
        *(torch.arange(0, batch * rows + 1, rows, dtype=torch.int32), rows),
        *(torch.full((batch,), 40, dtype=torch.int32), 40, 0.35, True, (-1, -1)),
        *(torch.arange(4 * batch).view(batch, 4), 0.0, None, None, None),
    )
    return vllm.unified_attention, args, options


def tree(batch: int) -> Call:
    return attention(batch, qq_bias=vllm.prepare_tree_attn_bias([(0,), (1,), (0, 0), (0, 1)]))


def packed_tree(batch: int) -> Call:
    return attention(batch, qq_bias=torch.arange(1, 10, 2).repeat(batch)[:, None])


def prefill(batch: int) -> Call:
    function, args, options = attention(batch)
    window = (2, 0)  # fewer than the rows in flight: ranked_attention, as for 1024 rows and more
    return function, (*args[:10], window, *args[11:]), options


def pack(batch: int) -> Call:
    bias = vllm.prepare_tree_attn_bias([(0,), (1,), (0, 0)])
    cu = torch.arange(0, 4 * batch + 1, 4, dtype=torch.int32)
    return vllm.pack_qq_bias, (bias, cu, 4, 4 * batch), {}


def remask(batch: int) -> Call:
    draft = torch.randint(0, V, (batch, 8))
    draft[:, ::2] = V - 1
    return vllm.batched_remask, (torch.randn(batch, 8, V), draft, V - 1, 0.9), {}


def llada2(batch: int) -> Call:
    args = remask(batch)[1][:2]
    return vllm.llada2_remask, args, {"remasking_config": {"mask_token_id": V - 1}}


def policy(batch: int) -> Call:
    draft = torch.arange(8).tolist()
    return (
        lambda **kwargs: tuple(vllm.Llada2DefaultRemaskingPolicy().apply(**kwargs)),
        (),
        {
            "input_draft": draft,
            "logits": torch.randn(8, V),
            "remasking_config": {"mask_token_id": 3},
        },
    )


CALLS = {
    # the row lists of packed rows are made of the cumulative counts
    "v1.rejection_sample": Adapter(v1, budget=60),
    "v1.rejection_sample, seeded": Adapter(
        v1_seeded,
        budget=60,
        not_compiled="torch.compile does not take a torch.Generator, here as in vLLM",
        reads_data="a CPU generator draws for no other device",
    ),
    "v2.rejection_sample": Adapter(v2, budget=60),
    "unified_attention": Adapter(attention),
    "unified_attention, tree": Adapter(tree, budget=60),
    "unified_attention, packed tree": Adapter(packed_tree),
    "unified_attention, prefill": Adapter(prefill, budget=60),
    "pack_qq_bias": Adapter(pack, budget=60),
    "batched_remask": Adapter(remask),
    "llada2_remask": Adapter(llada2),
    "Llada2DefaultRemaskingPolicy": Adapter(
        policy, not_compiled="Python lists in and out", reads_data="the same"
    ),
}
