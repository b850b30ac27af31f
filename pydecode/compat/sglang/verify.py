"""SGLang's verification of trees and chains: results written into the caller's tensors."""

import torch
from torch import Tensor

import pydecode

from ...results import Verified
from ...validation import expect_dim, expect_shape


def verify_tree_greedy(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    target_predict: Tensor,
) -> None:
    """Walks a tree along the target's own choices: ``sgl_kernel.verify_tree_greedy``.

    From the root on, the first child in its list whose token is the target's is accepted, at most
    S - 1 of them. Also TensorRT-LLM's walk (``verifyDynamicTreeGreedy``).

    Args:
        predicts: **mutated**, int32 [rows]: at each accepted node's row the token that follows it,
            the last one being the target's own; other rows stay.
        accept_index: **mutated**, int32 [bs, S], rows of the accepted nodes, root first; -1 after
            them (theirs leaves the caller's prefill there).
        accept_token_num: **mutated**, int32 [bs], accepted nodes without the root.
        candidates: int64 [bs, ndt], the nodes' tokens; node 0 is the root.
        retrive_index: int64 [bs, ndt], the nodes' rows of predicts and of the flat target_predict,
            in any order.
        retrive_next_token, retrive_next_sibling: int64 [bs, ndt], first child and next sibling by
            node, -1 where a list ends; lists in any order, any other link out of range ends one.
        target_predict: int64 [bs, ndt], the target's token after each row.

    A row outside predicts is neither read nor written (theirs does both). If the walk reads a
    negative target token or comes to a row that is outside the tensors, the request is undecided:
    accept_index is the root alone, accept_token_num 0 and predicts[root] -1 (theirs accepts a
    candidate of the same negative token). An engine ends such a request when it meets the -1.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit, by name.
    """
    S = _expect(accept_index, accept_token_num, candidates, retrive_index, predicts)
    parents, order = pydecode.trees.from_links(retrive_next_token, retrive_next_sibling)
    order = order.clamp(min=0)  # absent nodes have no parent, so what stands there is not read
    rows = retrive_index.gather(1, order)
    done = pydecode.verify_greedy(
        candidates.gather(1, order),
        target_predict.flatten(),
        parents=parents,
        max_depth=S - 1,
        row_index=rows,
        first_match=True,
    )
    _write(done, rows, predicts, accept_index, accept_token_num)


def tree_speculative_sampling_target_only(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    uniform_samples: Tensor,
    uniform_samples_for_final_sampling: Tensor,
    target_probs: Tensor,
    draft_probs: Tensor | None,
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
    deterministic: bool = True,
) -> None:
    """Samples a path by the target's law alone: ``tree_speculative_sampling_target_only``.

    One coin a node serves its children: acc += p(child), the first child with coin < acc /
    max(threshold_acc, 1e-9) or p(child) >= threshold_single is accepted; if none is, the last
    token is drawn from p less the children that were tried. Exact at thresholds 1.

    Args:
        predicts, accept_index, accept_token_num, candidates, retrive_index, retrive_next_token,
            retrive_next_sibling: as in ``verify_tree_greedy``.
        uniform_samples: fp32 [bs, ndt], node n's coin for its children.
        uniform_samples_for_final_sampling: fp32 [bs].
        target_probs: float [bs, ndt, V], row n: after node n (by node, not by retrive_index), the
            batch and node dimensions one run in memory. A row is divided by its sum.
        draft_probs: neither read nor written, so None or anything; theirs wants V-sized zeros for
            scratch and leaves them dirty.
        threshold_single, threshold_acc: below 1 more is accepted, at a bias.
        deterministic: no matter; ours always is.

    Where theirs accepts at coin <= acc, so that a coin of 0 takes a token of probability 0, ours
    does not; a child that repeats a tried token adds nothing (theirs counts its mass twice);
    candidates outside [0, V) are absent; offsets are 64-bit. A request whose walk reads a row with
    NaN or without any mass is undecided, as ``verify_tree_greedy`` has it (theirs: token V - 1).

    Raises:
        ValueError, TypeError: a shape, dtype or layout that does not fit, by name.
    """
    if draft_probs is not None and not isinstance(draft_probs, Tensor):
        raise TypeError(  # a version of theirs has no draft_probs: thresholds would be lost here
            f"draft_probs: expected a tensor or None, got {draft_probs!r}; give thresholds by name"
        )
    S = _expect(accept_index, accept_token_num, candidates, retrive_index, predicts)
    B, T = candidates.shape
    expect_shape("uniform_samples", uniform_samples, (B, T), "[bs, ndt]")
    final = uniform_samples_for_final_sampling
    expect_shape("uniform_samples_for_final_sampling", final, (B,), "[bs]")
    expect_shape("target_probs", target_probs, (B, T, target_probs.shape[-1]), "[bs, ndt, V]")
    if B > 1 and T > 1 and target_probs.stride(0) != T * target_probs.stride(1):
        raise ValueError(
            "target_probs: expected batch and node dimensions that are one run in memory, got "
            f"strides {list(target_probs.stride())}"
        )
    parents, order = pydecode.trees.from_links(retrive_next_token, retrive_next_sibling)
    order = order.clamp(min=0)
    rows = retrive_index.gather(1, order)
    first = torch.arange(0, B * T, T, device=order.device)[:, None]
    done = pydecode.rejection_sample_tree(
        None,
        candidates.gather(1, order),
        parents,
        target_probs=target_probs.view(B * T, -1),
        row_index=order + first,
        rule="target_only",
        max_depth=S - 1,
        threshold_single=threshold_single,
        threshold_acc=threshold_acc,
        uniforms=torch.cat([uniform_samples.gather(1, order), final[:, None]], 1),
    )
    _write(done, rows, predicts, accept_index, accept_token_num)


def chain_speculative_sampling_triton(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor | None,
    retrive_next_sibling: Tensor | None,
    uniform_samples: Tensor,
    uniform_samples_for_final_sampling: Tensor,
    target_probs: Tensor,
    draft_probs: Tensor,
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
    deterministic: bool = True,
) -> None:
    """Rejection sampling of a chain: SGLang's ``chain_speculative_sampling_triton``.

    Draft i is ``candidates[:, i]``, i >= 1; its coin is ``uniform_samples[:, i - 1]``. Accepted if
    coin * q < p; after a rejection the last token is drawn from (p - q)+.

    Args:
        predicts, accept_index, accept_token_num, candidates, retrive_index: as in
            ``verify_tree_greedy``; min(ndt, S) - 1 drafts are tested.
        uniform_samples: fp32 [bs, ndt]. uniform_samples_for_final_sampling: fp32 [bs].
        target_probs: float [bs, ndt, V]. draft_probs: float [bs, ndt - 1 (or more), V], any strides
            but the last. Both are divided by their rows' sums.
        retrive_next_token, retrive_next_sibling, threshold_single, threshold_acc, deterministic:
            not read, as theirs reads none of them.

    Differs where p = q everywhere after a rejection (p is sampled; theirs gives V - 1), for a draft
    that its law gives no probability (rejected; theirs accepts if p > 0), for drafts outside [0, V)
    (the chain ends; theirs reads out of bounds) and for NaN (undecided, as ``verify_tree_greedy``
    has it). accept_index may have any strides; theirs writes it with those of retrive_index.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit, by name.
    """
    S = _expect(accept_index, accept_token_num, candidates, retrive_index, predicts)
    B, T = candidates.shape
    final = uniform_samples_for_final_sampling
    expect_shape("uniform_samples_for_final_sampling", final, (B,), "[bs]")
    drafts = min(T, S) - 1
    done = pydecode.rejection_sample(
        None,
        candidates[:, 1 : drafts + 1],
        draft_probs=draft_probs[:, :drafts],
        target_probs=target_probs[:, : drafts + 1],
        uniforms=torch.cat([uniform_samples[:, :drafts], final[:, None]], 1),
    )
    _write(done, retrive_index, predicts, accept_index, accept_token_num)


def _expect(
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    predicts: Tensor,
) -> int:
    """Checks what the ops do not see; returns S."""
    expect_dim("predicts", predicts, 1, "[rows]")
    expect_dim("candidates", candidates, 2, "[bs, ndt]")
    expect_shape("retrive_index", retrive_index, candidates.shape, "[bs, ndt]")
    bs = candidates.shape[0]
    if accept_index.dim() != 2 or accept_index.shape[0] != bs or accept_index.shape[1] == 0:
        got = list(accept_index.shape)
        raise ValueError(f"accept_index: expected shape [bs, S] = [{bs}, >= 1], got {got}")
    expect_shape("accept_token_num", accept_token_num, (bs,), "[bs]")
    return accept_index.shape[1]


def _write(
    done: Verified,
    rows: Tensor,
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
) -> None:
    """rows [bs, nodes]: where the path's nodes lie. An undecided request keeps its root alone."""
    accept_token_num.copy_(done.num_accepted)
    path = done.path.long()
    index = rows.gather(1, path.clamp(min=0)).masked_fill(path < 0, -1)
    index[:, :1] = rows[:, :1]
    width = index.shape[1]
    accept_index[:, :width].copy_(index)
    if accept_index.shape[1] > width:
        accept_index[:, width:].fill_(-1)
    # entries past the end take what goes nowhere
    size = predicts.shape[0]
    slot = index.clamp(-1, size) % (size + 1)
    written = torch.cat([predicts, accept_token_num])
    written.scatter_(0, slot.flatten(), done.tokens.to(written.dtype).flatten())
    predicts.copy_(written[:size])
