"""What the references of verification share: the draft law, the draws, log-probabilities."""

import torch
from torch import Tensor

from . import laws
from .laws import Filters, Rows
from .numbers import compute_dtype


def draft_law(
    draft_logits: Tensor | None,
    draft_probs: Tensor | None,
    draft_row_index: Tensor | None,
    draft_vocab: Tensor | None,
    f: Filters,
    draft_temperature: Tensor,
    filter_draft: bool,
    vocab: int,
) -> Rows:
    """The law q that the drafts were drawn from, over the target's vocabulary."""
    f = f if filter_draft else Filters(f.temperature, None, None, None)
    f = f._replace(temperature=draft_temperature)
    q = laws.law(draft_logits, draft_probs, draft_row_index, f)
    return q if draft_vocab is None else q._replace(p=to_target_vocab(q.p, draft_vocab, vocab))


def to_target_vocab(q: Tensor, draft_vocab: Tensor, vocab: int) -> Tensor:
    """q [..., Vd] -> [..., V]: column j is target token draft_vocab[j], or dropped."""
    inside = (draft_vocab >= 0) & (draft_vocab < vocab)
    index = torch.where(inside, draft_vocab.long(), vocab)
    return q.new_zeros(*q.shape[:-1], vocab + 1).index_add_(-1, index, q)[..., :vocab]


def row_sum(x: Tensor) -> Tensor:
    """Sum over the last dimension, in an order that no other row changes (cumsum has one)."""
    return x.cumsum(-1)[..., -1]


def usable_uniforms(u: Tensor) -> Tensor:
    """A uniform that is NaN or negative counts as 1: it accepts nothing that p does not cover."""
    return torch.where(u >= 0, u, 1.0)


def unfiltered_logprobs(
    logits: Tensor | None,
    probs: Tensor | None,
    row_index: Tensor | None,
    allowed: Tensor | None,
    temperature: Tensor,
) -> Tensor:
    """log_softmax(logits / temperature) [B, R, V], temperature 0 read as 1, or log of probs."""
    f = Filters(torch.where(temperature == 0, 1.0, temperature), None, None, None)
    if logits is None:
        return laws.law(None, probs, row_index, f, allowed).p.log()
    x, _, _ = laws.take_rows(logits, row_index)
    x = x.to(compute_dtype(x.dtype))
    if allowed is not None:
        x = x.masked_fill(~laws.allowed_bits(allowed, x.shape[-1]), -torch.inf)
    x, _ = laws.usable_logits(x)
    return laws.tempered_logits(x, f.temperature).log_softmax(-1)
