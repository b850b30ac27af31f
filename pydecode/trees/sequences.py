"""A trie of candidate continuations."""

import torch
from torch import Tensor

from ..validation import INTS, checking, data_range, expect_dim, expect_dtype, expect_tensor, number
from .masks import depths, mask_from_parents
from .tree import Tree


def from_sequences(tokens: Tensor, counts: int | Tensor | None = None) -> tuple[Tree, Tensor]:
    """The trie of candidate continuations (n-grams, retrieved text, samples), on the device.

    Candidates with a common prefix share its nodes: node (c, d) is kept iff no earlier candidate
    starts with the same d + 1 tokens (REST, He et al., NAACL 2024, section 3.2). Kept nodes come in
    order of (c, d) behind the root, so parents precede their children and earlier candidates' nodes
    precede later ones'.

    Args:
        tokens: int32 or int64 [B, C, n], candidates; each ends before its first token < 0.
        counts: int or int32/int64 0-d or [B], how many of the C candidates are valid (as
            ``NgramPool.lookup`` returns it). None: all. Clipped to [0, C].

    Returns:
        Tree with [B, T] tensors, T = 1 + C * n whatever the data, and max_depth n: then draft
        tokens [B, T] int64. choice [B, T] is c * n + d, where the token lay in
        ``tokens.flatten(1)`` (0 for the root and unused nodes). Unused nodes come last, with parent
        -1 and token -1. The root's token is -1 too, a placeholder that verification does not read
        and the model's forward needs: ``draft[:, 0] = last_token``. Before that,
        ``num_drafts = (draft >= 0).sum(1)`` is the verification ops' number of drafted nodes.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, by name; under
            ``pydecode.checks(True)`` also a count outside [0, C].

    >>> import torch, pydecode
    >>> tree, draft = pydecode.trees.from_sequences(torch.tensor([[[5, 6], [5, 7]]]))
    >>> tree.parents, draft
    (tensor([[-1,  0,  1,  1, -1]]), tensor([[-1,  5,  6,  7, -1]]))
    """
    tokens = expect_tensor("tokens", tokens)
    expect_dtype("tokens", tokens, INTS)
    expect_dim("tokens", tokens, 3, "[B, C, n]")
    B, C, n = tokens.shape
    device = tokens.device
    count, count_tensor = number("counts", C if counts is None else counts, B, device, kind=int)
    if count_tensor is not None:
        if checking():
            data_range("counts", count_tensor, 0, C + 1)
        valid = torch.arange(C, device=device) < count_tensor.expand(B)[:, None]
    else:
        valid = (torch.arange(C, device=device) < count).expand(B, C)

    # the first candidate that starts with the same d + 1 tokens, [B, C, n]
    tokens = tokens.long()
    alive = ((tokens >= 0) & valid[..., None]).long().cumprod(-1)
    same = (tokens[:, :, None] == tokens[:, None]).long().cumprod(-1)  # [B, C, C, n]
    same = same * alive[:, :, None] * alive[:, None]
    c = torch.arange(C, device=device)
    first = torch.where(same == 1, c[:, None], C).amin(2) if C else tokens
    kept = (first == c[:, None]).flatten(1)  # [B, C * n]

    # a kept node's place behind the root; the others all go to a slot past the end
    T = 1 + C * n
    place = torch.where(kept, kept.long().cumsum(-1), T)
    d = torch.arange(n, device=device)
    above = (first * n + d).roll(1, -1)  # where (c, d - 1) is kept
    above = above.flatten(1).clamp(max=T - 2)
    parent = torch.where((d > 0).expand(C, n).flatten(), place.gather(1, above), 0)

    def collect(x: Tensor, unused: int) -> Tensor:
        nodes = torch.full((B, T + 1), unused, dtype=torch.int64, device=device)
        return nodes.scatter_(1, place, x)[:, :T].contiguous()

    parents = collect(parent, -1)
    at = torch.arange(C * n, device=device).expand(B, C * n)
    tree = Tree(parents, depths(parents), mask_from_parents(parents), collect(at, 0), n if C else 0)
    return tree, collect(tokens.flatten(1), -1)
