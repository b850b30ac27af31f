"""No op synchronises: the references run on meta tensors, which have no data that could be read.

Reading a value (``.item()``, ``bool(tensor)``), boolean indexing and ``nonzero`` raise there, and
what a reference does for CPU tensors only is left out.
"""

import pytest
import torch
from test_binding import recorded
from torch.utils import _pytree as pytree

from pydecode import NgramPool
from pydecode.schemas import SCHEMAS


@pytest.mark.parametrize("op", SCHEMAS)
def test_the_reference_reads_no_data(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, (*args, _) = recorded(op, monkeypatch)
    module = __import__(f"pydecode.reference.{op}", fromlist=[op])
    args = pytree.tree_map_only(torch.Tensor, lambda x: x.to("meta"), args)
    results = pytree.tree_leaves(getattr(module, op)(*args))
    assert all(x.device.type == "meta" for x in results)


def test_the_ngram_pool_reads_no_data() -> None:
    pool = NgramPool(8, 3, 2, device="meta")
    pool.insert(torch.zeros(4, device="meta").long(), torch.zeros(4, 3, device="meta").int())
    candidates, counts = pool.lookup(torch.zeros(5, device="meta").long())
    assert candidates.shape == (5, 2, 3)
    assert counts.shape == (5,)


def test_a_read_is_noticed() -> None:
    """Negative control."""
    x = torch.ones(3, device="meta")
    for read in (lambda: x.sum().item(), lambda: x[x > 0], lambda: bool((x > 0).all())):
        with pytest.raises(Exception, match="meta"):
            read()
