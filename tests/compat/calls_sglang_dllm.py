"""The adapters of ``pydecode.compat.sglang.dllm``: see adapters.py."""

import torch
from adapters import Adapter, Call

from pydecode.compat.sglang.dllm import dllm_post_process_fused

V = 50


def batched(batch: int) -> Call:
    ids = torch.randint(0, V, (batch, 8))
    ids[:, ::2] = V - 1
    return dllm_post_process_fused, (torch.randn(batch, 8, V), ids, V - 1, 0.95), {}


def single(batch: int) -> Call:
    function, (logits, ids, *rest), options = batched(1)
    return function, (logits[0], ids[0], *rest), options


CALLS = {
    "dllm_post_process_fused": Adapter(batched),
    "dllm_post_process_fused, one request": Adapter(single),
}
