"""The masks of attn_implementation="pydecode": what SDPA's would say, made without reading data."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from tiny_llama import tiny_llama  # noqa: E402
from transformers import masking_utils as theirs  # noqa: E402

import pydecode  # noqa: E402
from pydecode.compat.transformers import attention, masks  # noqa: E402


def seen_of(mask: Tensor, B: int, N: int, S: int) -> Tensor:
    """What a mask of ours lets be seen, bool [B, N, S], by the words of the contract."""
    if mask.dtype == torch.bool:
        return mask[:, 0].expand(B, N, S)
    row = mask[:, 0, 0].expand(B, N + S)
    q, k = row[:, :N, None], row[:, None, N:]
    return (k <= q) & (k != pydecode.ranks.PAD)


def padding(kind: str, B: int, width: int) -> Tensor | None:
    real = torch.ones(B, width, dtype=torch.bool)
    for b in range(B):
        if kind == "left":
            real[b, : 2 * b] = False
        elif kind == "right":
            real[b, width - b :] = False
        elif kind == "holes":
            real[b] = torch.rand(width) < 0.7
    return None if kind == "none" else real


CACHES = {  # q_length, kv_length, q_offset, kv_offset
    "prompt": (6, 6, 0, 0),
    "one token": (1, 9, 8, 0),
    "several": (3, 9, 6, 0),
    "a static cache": (3, 12, torch.tensor([4]), 0),
    "a static cache, one token": (1, 12, torch.tensor(11), 0),
    "an empty static cache": (4, 12, 0, 0),
    "a sliding cache": (2, 6, 11, 7),
    "cross": (4, 9, 0, 0),
}


@pytest.mark.parametrize("kind", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("pattern", ["causal", "window", "wide window", "all", "all, window"])
def test_what_sdpa_would_see(pattern: str, cache: str, kind: str) -> None:
    B, (N, S, q_offset, kv_offset) = 3, CACHES[cache]
    real = padding(kind, B, kv_offset + S - (3 if "static" in cache else 0))
    size = {"window": 4, "wide window": 40, "all, window": 2}.get(pattern)
    function = {
        "causal": theirs.causal_mask_function,
        "all": theirs.bidirectional_mask_function,
        "all, window": theirs.sliding_window_bidirectional_mask_function(2),
    }.get(pattern) or theirs.sliding_window_causal_mask_function(size)
    options: dict[str, Any] = dict(
        batch_size=B, q_length=N, kv_length=S, q_offset=q_offset, kv_offset=kv_offset
    )
    options |= dict(mask_function=function, attention_mask=real, local_size=size)
    want = theirs.sdpa_mask(**options, allow_is_causal_skip=False)
    bidirectional = pattern.startswith("all")
    got = masks.make_mask(
        **options,
        allow_is_causal_skip=not bidirectional,
        allow_is_bidirectional_skip=bidirectional,
        dtype=torch.float32,
        config=None,
    )
    assert got.dim() == 4  # so that transformers takes it as it is, when it comes again
    assert torch.equal(seen_of(got, B, N, S), want[:, 0])
    if size is None or size > S:  # and it is small
        assert got.dtype == torch.int32
        assert got.numel() == (1 if real is None else B) * (N + S)
    # a model that will change the mask gets a mask
    plain = masks.make_mask(**options, allow_is_causal_skip=False)
    assert torch.equal(plain, want)


def test_ranks_are_given_once() -> None:
    """The op gets views of the mask; also where only the mask itself has come through."""
    mask = masks.make_mask(2, 3, 5, 2, attention_mask=padding("left", 2, 5))
    for given in (mask, mask.clone()):
        seen, poison = masks.read_mask(given, 2, 3, 5, nn.Module())
        assert poison is None
        assert seen["q_rank"].tolist() == [[2, 3, 4]] * 2
        assert seen["k_rank"][1].tolist() == [pydecode.ranks.PAD] * 2 + [2, 3, 4]
        assert seen["k_rank"].untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
    with pytest.raises(ValueError, match=r"attention_mask: expected ranks \[B\|1, 1, 1, 9\]"):
        masks.read_mask(mask, 2, 3, 6, nn.Module())


class NoReads(TorchDispatchMode):
    """Fails where a value is read on the host, outside pydecode's ops."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.equal)
        return func(*args, **kwargs or {})


def test_no_value_is_read() -> None:
    """From the 2-D mask to the logits, also behind a static cache."""
    model = tiny_llama(attn_implementation="pydecode")
    tokens, real = torch.randint(3, 61, (3, 7)), padding("left", 3, 7).long()  # type: ignore[union-attr]
    cache = transformers.StaticCache(config=model.config, max_cache_len=12)
    with NoReads(), torch.no_grad():
        model(tokens, attention_mask=real, use_cache=False)
        model(tokens[:, :5], attention_mask=real[:, :5], past_key_values=cache)
        model(tokens[:, 5:], attention_mask=real, past_key_values=cache)
    with NoReads(), pytest.raises(AssertionError):  # it can fail
        bool(real.all())


# ---- float masks ---------------------------------------------------------------------------------


def layers(n: int) -> list[nn.Module]:
    out = [nn.Module() for _ in range(n)]
    for i, module in enumerate(out):
        module.layer_idx = i  # type: ignore[assignment]
    return out


@pytest.fixture
def qkv() -> list[Tensor]:
    return [torch.randn(2, 2, n, 8) for n in (3, 5, 5)]


def attend(module: nn.Module, qkv: list[Tensor], mask: Tensor) -> Tensor:
    return attention(module, *qkv, mask)[0]


@pytest.mark.parametrize("inference", [False, True])
def test_float_masks_are_converted_once_a_pass(
    inference: bool, qkv: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And again in the next pass, when the same tensor holds something else."""
    calls, convert = [], masks._convert
    monkeypatch.setattr(masks, "_convert", lambda x: calls.append(1) or convert(x))
    with torch.inference_mode(inference):
        mask = torch.zeros(2, 1, 3, 5)
        for round_ in range(3):
            visible = torch.rand(2, 1, 3, 5) < 0.6
            visible[..., 0] = True
            # numpy is not noticed by torch; the order of the layers is
            mask.numpy()[:] = torch.where(visible, 0.0, -torch.inf).numpy()
            want = scaled_dot_product_attention(*qkv, attn_mask=visible).transpose(1, 2)
            for module in layers(4):
                torch.testing.assert_close(attend(module, qkv, mask), want)
            assert len(calls) == round_ + 1
        attend(nn.Module(), qkv, mask)  # a layer that does not say which it is
        assert len(calls) == 4
    if not inference:
        mask.zero_()  # in the middle of a pass
        want = scaled_dot_product_attention(*qkv).transpose(1, 2)
        torch.testing.assert_close(attend(layers(3)[2], qkv, mask), want)


@pytest.mark.parametrize("low", [-9000.0, -1e4, -torch.inf, "min"], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_hides(low: Any, dtype: torch.dtype) -> None:
    low = torch.finfo(dtype).min if low == "min" else low
    mask = torch.tensor([0.0, -0.0, low], dtype=dtype).view(1, 1, 1, 3)
    assert masks._convert(mask)[0].flatten().tolist() == [True, True, False]


BIAS = list(itertools.product([0.25, -1.0, torch.inf, torch.nan, -8000.0], [0, 2]))


@pytest.mark.parametrize(("value", "row"), BIAS)
def test_a_bias_is_never_silent(value: float, row: int, qkv: list[Tensor]) -> None:
    """An error where the host knows; where only the device does, NaN in the rows it is for."""
    mask = torch.zeros(2, 1, 3, 5)
    mask[1, 0, row, 4] = value
    with pytest.raises(NotImplementedError, match="attention_mask: a bias other than 0 and -inf"):
        attend(nn.Module(), qkv, mask)
    torch._dynamo.reset()
    out = torch.compile(attend, backend="eager", fullgraph=True)(nn.Module(), qkv, mask)
    wrong = torch.zeros(2, 3, dtype=torch.bool)
    wrong[1, row] = True
    assert torch.equal(out.isnan().flatten(2).all(-1), wrong)
    want = scaled_dot_product_attention(*qkv).transpose(1, 2)
    torch.testing.assert_close(out[~wrong], want[~wrong])
