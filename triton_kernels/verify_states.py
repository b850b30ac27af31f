"""Verification of drafted block states in one launch: a program walks one request's graph."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import BackendUnavailable
from ..replay import launch
from . import configurations
from .devices import on_device_of
from .static_call import StaticCall
from .vocabulary import plain

CONFIGURATIONS = configurations.load("verify_states")


@triton.jit(do_not_specialize=["mask_id", "K", "L"])
def walk(
    states,
    targets,
    graph,
    best,
    mask_id,
    K,
    L,
    state_strides,
    target_strides,
    graph_strides,
    SUBSET: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """best [B]. Strides of b, k, l; the graph's of b (0 where it
    is shared, as ``plain`` has it), from, to. All K states are held at once."""
    b = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, STATES)
    row = k.to(tl.int64)
    states += b * state_strides[0]
    targets += b * target_strides[0]
    at = tl.zeros([], tl.int64)
    fresh = (k > 0) & (k < K)  # where the walk has not been: cycles end it
    going = K > 1
    while going:
        if graph is None:
            child = fresh & (k > at)
        else:
            edge = (
                graph + b * (graph_strides[0] >> 2) + at * graph_strides[1] + row * graph_strides[2]
            )
            child = fresh & (tl.load(edge, mask=k < K, other=0) != 0)
        wrong = tl.zeros([STATES], tl.int32)
        for i in range(0, L, BLOCK):
            o = i + tl.arange(0, BLOCK)
            column = o.to(tl.int64)
            inside = (k < K)[:, None] & (o < L)[None, :]
            place = row[:, None] * state_strides[1] + column[None, :] * state_strides[2]
            state = tl.load(states + place, mask=inside, other=0).to(tl.int64)
            place = at * target_strides[1] + column * target_strides[2]
            target = tl.load(targets + place, mask=o < L, other=0).to(tl.int64)
            differs = inside & (state != target[None, :])
            if SUBSET:
                differs = differs & (state != mask_id)
            wrong += tl.sum(differs.to(tl.int32), 1)
        child = child & (wrong == 0)
        going = tl.sum(child.to(tl.int32)) > 0
        if going:
            if SUBSET:
                at = tl.max(tl.where(child, k, -1)).to(tl.int64)
            else:
                at = tl.min(tl.where(child, k, STATES)).to(tl.int64)
        fresh = fresh & (k != at)
    tl.store(best + b, at)


def verify_states(
    states: Tensor, targets: Tensor, mask_id: int, rule: str, graph: Tensor | None
) -> Tensor:
    """states, targets [B, K, L], graph bool [B|1, K, K] -> best int64 [B]."""
    B, K, _ = states.shape
    key = key_of(K)
    best = torch.empty(B, dtype=torch.int64, device=states.device)
    if B:
        with on_device_of(states):
            launch(
                walk,
                (B,),
                **arguments(states, targets, mask_id, rule, graph, best),
                **CONFIGURATIONS[key],
            )
    return best


def key_of(K: int) -> tuple[int]:
    """The least number of states in the table that holds K."""
    sizes = sorted(key[0] for key in CONFIGURATIONS)  # type: ignore[index]
    for size in sizes:
        if size >= K:
            return (size,)
    raise BackendUnavailable(
        f"verify_states: 'triton' cannot run this call: up to {sizes[-1]} states, got {K}"
    )


def arguments(
    states: Tensor, targets: Tensor, mask_id: int, rule: str, graph: Tensor | None, best: Tensor
) -> dict[str, Any]:
    edges = (0, 0, 0)
    if graph is not None:
        shared = plain(graph.stride(0) if graph.shape[0] > 1 else 0)
        edges = (shared, *graph.stride()[1:])
    return dict(
        states=states,
        targets=targets,
        graph=None if graph is None else graph.view(torch.uint8),
        best=best,
        mask_id=mask_id,
        K=states.shape[1],
        L=states.shape[2],
        state_strides=states.stride(),
        target_strides=targets.stride(),
        graph_strides=edges,
        SUBSET=rule == "subset",
    )


def static_calls(arch: str) -> Iterator[StaticCall]:
    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    for key in CONFIGURATIONS:
        K = key[0]  # type: ignore[index]
        states, graph = empty(8, K, 32), empty(8, K, K, dtype=torch.bool)
        for rule, edges in (("exact", None), ("subset", graph), ("exact", graph), ("subset", None)):
            made = arguments(states, states, 0, rule, edges, empty(8))
            note = f"{rule}{'' if edges is None else ', graph'}"
            yield StaticCall(walk, key, made, torch.int64, note=note)
    narrow = empty(8, 16, 32, dtype=torch.int32)
    made = arguments(narrow, narrow, 0, "exact", None, empty(8))
    yield StaticCall(walk, (16,), made, torch.int32, note="int32")
