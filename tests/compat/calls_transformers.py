"""The adapters of ``pydecode.compat.transformers``: see adapters.py."""

import torch
from adapters import Adapter, Call

from pydecode.compat.transformers import _speculative_sampling, attention
from pydecode.compat.transformers.masks import make_mask


def speculative_sampling(batch: int) -> Call:
    """Theirs is of one request; the batch is the number of candidates."""
    ids = torch.randint(50, (1, 7 + batch))
    q, p = torch.randn(1, batch, 50), torch.randn(1, batch + 1, 50)
    return _speculative_sampling, (ids, q, batch, p), {}


def padding(batch: int) -> torch.Tensor:
    return torch.arange(9) >= torch.arange(batch)[:, None] % 5


def one_layer(batch: int, mask: torch.Tensor) -> Call:
    q, k, v = torch.randn(batch, 4, 3, 8), torch.randn(batch, 2, 9, 8), torch.randn(batch, 2, 9, 8)
    options = dict(scaling=0.5, dropout=0.0, sliding_window=None, position_ids=None)
    return attention, (torch.nn.Module(), q, k, v, mask), options


def attention_ranks(batch: int) -> Call:
    return one_layer(batch, make_mask(batch, 3, 9, 6, attention_mask=padding(batch)))


def attention_mask(batch: int) -> Call:
    return one_layer(batch, torch.rand(batch, 1, 3, 9) < 0.6)


def masks(batch: int) -> Call:
    return make_mask, (batch, 3, 9, 6), dict(attention_mask=padding(batch), device="cpu")


CALLS: dict[str, Adapter] = {
    "attention": Adapter(attention_ranks),
    "attention, a mask": Adapter(attention_mask),
    "make_mask": Adapter(
        masks,
        budget=60.0,  # a mask is converted, once a forward pass; it calls no op
        reads_data="its device is an argument",
    ),
    "_speculative_sampling": Adapter(
        speculative_sampling,
        not_compiled="the result's width follows the data, as theirs does",
        reads_data="the result's width follows the data, as theirs does",
    ),
}
