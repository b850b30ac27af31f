"""A loop of the demo on the Triton kernels, interpreted: the same tokens as on the reference."""

import pytest
import torch

pytest.importorskip("transformers", reason="the demo's model is transformers'")
from tiny_llama import tiny_llama

from pydecode import BackendUnavailable
from pydecode.compat.transformers import CausalLM
from pydecode.demo import causal

PROMPT = [5, 9, 5, 7, 5, 9, 5]  # so that prompt lookup finds drafts


@pytest.mark.parametrize("method", ["plain greedy", "tree, lookup, K<=32"])
def test_the_same_tokens(method: str) -> None:
    from pydecode.triton_kernels import decode_attention

    lm = CausalLM(tiny_llama(0, num_hidden_layers=1))
    (found,) = [m for m in causal._methods(lm) if m.name == method]
    want = found.run(PROMPT, 4, None)
    lm.backend = "triton"
    plans = len(decode_attention._plans)
    got = found.run(PROMPT, 4, None)
    assert got.tokens == want.tokens
    assert got.accepted == want.accepted
    assert len(got.tokens) >= 4
    assert len(decode_attention._plans) > plans  # it was the kernel


def test_a_backend_that_cannot() -> None:
    lm = CausalLM(tiny_llama(0).double(), backend="triton")
    cache = lm.new_cache(1, 8)
    with pytest.raises(BackendUnavailable, match="fp64"):
        lm(torch.tensor([[1, 2]]), torch.arange(2)[None], cache, "causal")
