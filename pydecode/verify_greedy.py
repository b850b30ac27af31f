"""Greedy verification of drafted chains and trees: the public function and its binding."""

from typing import Any

import torch
from torch import Tensor

from . import binding
from . import verification_arguments as arguments
from .backends import choose, triton_kernels, unavailable
from .reference import verify_greedy as reference
from .replay import replayed
from .results import Verified
from .validation import (
    FLOATS,
    INTS,
    checking,
    expect_choice,
    expect_device,
    expect_dim,
    expect_dtype,
    expect_index,
    expect_shape,
    expect_tensor,
    number,
    static_number,
)

HAS = ("reference", "triton")


@replayed
def verify_greedy(
    draft_tokens: Tensor,
    target: Tensor,
    *,
    parents: Tensor | None = None,
    num_drafts: int | Tensor | None = None,
    max_depth: int | None = None,
    rule: str = "exact",
    top_k: int | Tensor = 1,
    distance: int = 0,
    posterior_threshold: float = 0.3,
    posterior_alpha: float = 0.09,
    temperature: float | Tensor = 1.0,
    row_index: Tensor | None = None,
    allowed: Tensor | None = None,
    first_match: bool = False,
    backend: str | None = None,
) -> Verified:
    """Accepts the deepest drafted path that the target agrees with, and adds the target's argmax.

    A node passes if its token x does, by the row after its parent (a chain's draft i: row i):

    - ``"exact"``: x is the argmax, the lowest index on ties: the output is what greedy decoding
      gives (Stern et al., NeurIPS 2018, section 3; trees: SpecInfer, ASPLOS 2024).
    - ``"top_k"``: x's logit is at least the k-th largest, so ties with it pass (Stern, section 5).
    - ``"distance"``: \\|x - argmax\\| <= distance, for ordered vocabularies (Stern, section 5).
    - ``"typical"``: p(x) > min(posterior_threshold, posterior_alpha * exp(-H)), where
      p = softmax(logits / temperature) and H = -sum p log(p + 1e-5) (Medusa, Cai et al., ICML 2024,
      section 2.3.1). Temperature 0 is exact. **All but exact are lossy by design.**

    A node is accepted if it and all its ancestors pass. The deepest one is taken, then (typical)
    the one with the larger sum of log p along its path, then the lowest index. The last token is
    the argmax of the last node's row, under every rule. With ``first_match`` a node's first child
    in index order that passes is its only one, as in the walks of SGLang and TensorRT-LLM: of
    siblings with equal tokens the first wins, though the path below another may be deeper.

    Args:
        draft_tokens: a chain's drafts [B, G], or with ``parents`` a tree's nodes [B, T], node 0 the
            last committed token; int32/int64. One outside [0, V) is absent: a chain ends before it,
            a tree loses that node and all below it.
        target: logits [B, G+1 | T, V], fp16, bf16, fp32 or fp64, or token ids [B, G+1 | T],
            int32/int64 (rules exact and distance only; a negative id is a bad row). Row n is what
            follows node n. With ``row_index`` any [rows, V], or ids [rows].
        parents: [B|1, T] int32/int64, parents[0] = -1, parents before children. A node whose parent
            is not in [0, n) is lost with all below it.
        num_drafts: int or [B]: drafts (chain) or nodes after the root (tree) of a ragged batch.
        max_depth: a tree's walk stops there (None: T - 1); the output has max_depth + 1 columns.
        top_k: number or [B], clipped to [1, V]. distance: int >= 0.
        posterior_threshold, posterior_alpha: floats >= 0. temperature: number or [B]; typical only.
        row_index: [B, G+1 | T] int32/int64 rows of a packed target, -1: no row. What follows such a
            node cannot be tested, and is lost; where it is the last node, the last token is -1.
        allowed: [B, G+1 | T, ceil(V/32)] int32, a grammar's bits (bit v % 32 of word v // 32):
            other logits count as -inf. Not with ids.
        first_match: whether the walk enters only the first child that passes.

    Returns:
        Verified: ``tokens`` int64 [B, G+1 | max_depth+1], accepted drafts, the last token, then -1;
        ``num_accepted`` int32 [B]; ``path`` int32, the accepted nodes from the root (a chain's is
        0..num_accepted), then -1; ``logprobs`` None. A request that reads a bad row (NaN, nothing
        allowed, a row index outside the rows) is undecided: tokens and path all -1, num_accepted 0.
        Read are the rows of accepted nodes that have children, and the last node's.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
        BackendUnavailable: the named backend cannot run this call.

    >>> import torch, pydecode
    >>> out = pydecode.verify_greedy(torch.tensor([[5, 6, 7]]), torch.tensor([[5, 6, 9, 1]]))
    >>> out.tokens, out.num_accepted
    (tensor([[ 5,  6,  9, -1]]), tensor([2], dtype=torch.int32))
    """
    if parents is None:
        sizes = arguments.chain_sizes(draft_tokens)
        if max_depth is not None:
            raise ValueError(f"max_depth: expected None without parents, got {max_depth}")
        depth = -1
    else:
        sizes = arguments.tree_sizes(draft_tokens, parents)
        depth = arguments.max_depth_of(max_depth, sizes.rows)
    device = draft_tokens.device
    expect_choice("rule", rule, ("exact", "top_k", "distance", "typical"))
    target = expect_tensor("target", target)
    expect_dtype("target", target, (*FLOATS, *INTS))
    V = torch.iinfo(torch.int64).max
    if target.is_floating_point():
        shape = (sizes.B, sizes.rows)
        arguments.expect_law("target", target, row_index, "row_index", shape, sizes.r, device)
        V = target.shape[-1]
        allowed = arguments.expect_allowed(allowed, sizes, V, device)
    elif rule not in ("exact", "distance"):
        raise ValueError(f"rule: expected exact or distance with target ids, got {rule!r}")
    elif allowed is not None:
        raise ValueError("allowed: expected None with target ids, got a tensor")
    else:
        _expect_ids(target, row_index, sizes, device)
    count = arguments.num_drafts_of(num_drafts, sizes, device)
    if checking():
        first = 0 if parents is None else 1
        arguments.check_data(draft_tokens, count, V, target, row_index, first=first)
        if parents is not None:
            arguments.check_parents(parents, count)
    args = (
        *(draft_tokens, target, parents, *count, depth, rule),
        *number("top_k", top_k, sizes.B, device, kind=int, minimum=1),
        static_number("distance", distance, kind=int, minimum=0),
        static_number("posterior_threshold", posterior_threshold, minimum=0),
        static_number("posterior_alpha", posterior_alpha, minimum=0),
        *number("temperature", temperature, sizes.B, device, minimum=0),
        *(row_index, allowed, bool(first_match), choose("verify_greedy", backend, HAS, target)),
    )
    return Verified(*binding.call(_op, _run, *args))


def _expect_ids(
    target: Tensor, row_index: Tensor | None, sizes: arguments.Sizes, device: torch.device
) -> None:
    expect_device("target", target, device)
    shape = (sizes.B, sizes.rows)
    if row_index is None:
        expect_shape("target", target, shape, f"[B, {sizes.r}] ids")
    else:
        expect_index("row_index", row_index, shape, f"[B, {sizes.r}]", device)
        expect_dim("target", target, 1, "[rows] ids (as row_index is given)")


def _run(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *args, backend = args  # type: ignore[assignment]
    if backend == "reference":
        return reference.verify_greedy(*args)
    if backend == "triton":
        return triton_kernels("verify_greedy").verify_greedy(*args)
    raise unavailable("verify_greedy", backend)


def _fake(
    draft_tokens: Tensor,
    target: Tensor,
    parents: Tensor | None,
    num_drafts: int,
    num_drafts_tensor: Tensor | None,
    max_depth: int,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    width = draft_tokens.shape[1] + 1 if parents is None else max_depth + 1
    return arguments.fake_verified(draft_tokens, width, draft_tokens, False)[:3]


_op = binding.bind("verify_greedy", _run, _fake)
