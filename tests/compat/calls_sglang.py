"""The adapters of ``pydecode.compat.sglang``: see adapters.py."""

from types import SimpleNamespace
from typing import Any

import torch
from adapters import Adapter, Call
from torch import Tensor

from pydecode import trees
from pydecode.compat import sglang

NDT, S, V = 8, 4, 32


def lists(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """retrive_index, retrive_next_token and retrive_next_sibling of small trees."""
    parents = torch.tensor([-1, 0, 0, 1, 1, 2, 3, 5]).expand(batch, -1)
    return (torch.arange(batch * NDT).view(batch, NDT), *trees.links(parents))


def results(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """predicts, accept_index and accept_token_num as the engine prefills them."""
    predicts = torch.zeros(batch * NDT, dtype=torch.int32)
    index = torch.full((batch, S), -1, dtype=torch.int32)
    return predicts, index, torch.zeros(batch, dtype=torch.int32)


def verify_tree_greedy(batch: int) -> Call:
    tokens, target = torch.randint(3, (2, batch, NDT))
    return sglang.verify_tree_greedy, (*results(batch), tokens, *lists(batch), target), {}


def laws(batch: int, rows: int) -> Tensor:
    return torch.rand(batch, rows, V).softmax(-1)


def target_only(batch: int) -> Call:
    return (
        sglang.tree_speculative_sampling_target_only,
        (
            *results(batch),
            torch.randint(V, (batch, NDT)),
            *lists(batch),
            torch.rand(batch, NDT),
            torch.rand(batch),
            laws(batch, NDT),
        ),
        dict(draft_probs=None, threshold_acc=0.5),
    )


def chain(batch: int) -> Call:
    tokens = torch.randint(V, (batch, NDT))
    uniforms = torch.rand(batch, NDT), torch.rand(batch)
    laws_ = laws(batch, NDT), laws(batch, NDT - 1)
    args = (*results(batch), tokens, *lists(batch), *uniforms, *laws_, 1.0, 1.0, True)
    return sglang.chain_speculative_sampling_triton, args, {}


def build(mode: int) -> Any:
    def make(batch: int) -> Call:
        above = torch.arange(-1, 4).expand(batch, -1).contiguous()
        selected = torch.tensor([0, 1, 3, 4, 5, 9, 17]).expand(batch, -1).contiguous()
        lengths, _ = torch.arange(batch), above
        size = {0: NDT * int((lengths + NDT).sum()), 1: batch * NDT * NDT, 2: batch * NDT}[mode]
        mask = torch.ones(size, dtype=torch.uint8 if mode == 2 else torch.bool)
        links = torch.full((3, batch, NDT), -1).unbind()
        args = (above, selected, lengths, mask, torch.zeros(batch * NDT).long(), *links)
        return sglang.build_tree_kernel_efficient, (*args, 4, 2, NDT, mode), {}

    return make


def reconstruct(batch: int) -> Call:
    parents = torch.tensor([-1, 0, 0, 1, 1, 2, 3, 5]).expand(batch, -1)
    mask = trees.unpack_mask(trees.mask_from_parents(parents), NDT)
    args = (mask, torch.arange(batch), torch.zeros(batch * NDT).long(), *lists(batch))
    return sglang.reconstruct_indices_from_tree_mask, (*args, batch, NDT), {}


def accepted(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """out_cache_loc, accept_index, num_correct_drafts."""
    path = torch.tensor([0, 2, 5, -1]).expand(batch, -1) + NDT * torch.arange(batch)[:, None]
    path[:, 3] = -1
    return torch.randperm(batch * NDT), path.int(), torch.full((batch,), 2, dtype=torch.int32)


def buffers(batch: int) -> list[Tensor]:
    return [torch.randn(batch * NDT, 2, 4) for _ in range(2)]


def commit_accepted_kv(batch: int) -> Call:
    return sglang.commit_accepted_kv, (buffers(batch), buffers(batch), *accepted(batch)), {}


def move_accept_tokens(batch: int) -> Call:
    class MHATokenToKVPool(SimpleNamespace):
        pass

    def move(k: list[Tensor], v: list[Tensor], loc: Tensor, index: Tensor, num: Tensor) -> None:
        pool = MHATokenToKVPool(k_buffer=k, v_buffer=v)
        allocator = SimpleNamespace(get_kvcache=lambda: pool)
        batch = SimpleNamespace(out_cache_loc=loc)
        sglang.move_accept_tokens_to_target_kvcache(batch, index, num, allocator)

    return move, (buffers(batch), buffers(batch), *accepted(batch)), {}


def get_src_tgt_cache_loc(batch: int) -> Call:
    args = (torch.arange(batch), *accepted(batch), NDT, 4)
    return sglang.get_src_tgt_cache_loc, args, {}


def get_src_tgt_cache_loc_compact(batch: int) -> Call:
    loc, index, num = accepted(batch)
    args = (torch.arange(batch), loc, index[:, :3].flatten(), num, NDT, 4)
    return sglang.get_src_tgt_cache_loc, args, {}


def move_kv_cache_native(batch: int) -> Call:
    loc = torch.randperm(batch * NDT)
    args = (buffers(batch), buffers(batch), loc[:batch], loc[batch : 2 * batch])
    return sglang.move_kv_cache_native, args, {}


CALLS: dict[str, Adapter] = {
    "verify_tree_greedy": Adapter(verify_tree_greedy, budget=60),
    "tree_speculative_sampling_target_only": Adapter(target_only, budget=60),
    "chain_speculative_sampling_triton": Adapter(chain, budget=60),
    "build_tree_kernel_efficient, full mask": Adapter(build(0), budget=60),
    "build_tree_kernel_efficient, qlen only": Adapter(build(1), budget=60),
    "build_tree_kernel_efficient, packed": Adapter(build(2), budget=60),
    "reconstruct_indices_from_tree_mask": Adapter(reconstruct, budget=60),
    "commit_accepted_kv": Adapter(commit_accepted_kv, budget=60),
    "move_accept_tokens_to_target_kvcache": Adapter(
        move_accept_tokens, budget=60, not_compiled="it takes the engine's objects"
    ),
    "get_src_tgt_cache_loc": Adapter(get_src_tgt_cache_loc, budget=60),
    "get_src_tgt_cache_loc, compacted": Adapter(get_src_tgt_cache_loc_compact, budget=60),
    "move_kv_cache_native": Adapter(move_kv_cache_native, budget=60),
}
