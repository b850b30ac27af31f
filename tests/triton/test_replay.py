"""Calls of known metadata are launched again, unchecked, and give what a first one does."""

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import pydecode
from pydecode import replay
from tests.examples import EXAMPLES

REPLAYED = [
    "tree_attention",
    "block_attention",
    "branch_attention",
    "ranked_attention",
    "merge_states",
    "coupled_accept",
    "jacobi_step",
    "verify_states",
    "commit",
    "remask",
    "commit_kv",
    "write_kv",
    "verify_greedy",
    "rejection_sample",
    "rejection_sample_tree",
    "sample_and_score",
    "unmask",
    "soft_embed",
]


def copied(x: Any) -> Any:
    """Another tensor of the same strides, in whatever it lies."""
    if isinstance(x, Tensor):
        memory = x.untyped_storage().clone()
        return torch.empty(0, dtype=x.dtype).set_(memory, x.storage_offset(), x.shape, x.stride())
    if isinstance(x, dict):
        return {name: copied(value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(map(copied, x))
    return x


def flat(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    return [t for part in x for t in flat(part)] if isinstance(x, (list, tuple)) else []


def known() -> list[Any]:
    return [x for x in replay._replays.values() if x is not None]


def contiguous(x: Any) -> Any:
    return x.contiguous() if isinstance(x, Tensor) else x


@pytest.mark.parametrize("op", REPLAYED)
def test_a_replay_gives_what_the_call_gives(op: str) -> None:
    """With other data in every call; what is written into its arguments included."""
    for turn in range(4):
        f, args, kwargs = EXAMPLES[op]()
        if op == "tree_attention":  # a bool mask is packed first, which is no launch of ours
            kwargs["mask"] = pydecode.trees.pack_mask(kwargs["mask"])
        if op == "commit_kv":  # a list of layers has a table of its own
            args = (*map(torch.stack, args[:2]), *args[2:])
        kwargs = dict(kwargs, backend="triton")
        twin_args, twin_kwargs = copied(args), copied(kwargs)
        got = f(*args, **kwargs)
        assert len(known()) == (turn > 0), "the second call is recorded"
        want = f.__wrapped__(*twin_args, **twin_kwargs)
        pairs = zip(flat((got, args)), flat((want, twin_args)), strict=True)
        assert all(torch.equal(x, y) or (x != x).equal(y != y) for x, y in pairs)


def call(**more: Any) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    q, kv, cache = torch.randn(1, 3, 2, 16), torch.randn(1, 3, 2, 16), torch.randn(1, 16, 2, 16)
    given: dict[str, Any] = dict(mask="causal", cache_seqlens=torch.tensor([9]), backend="triton")
    return (q, cache, cache.clone(), kv, kv.clone()), dict(given, **more)


def attend(*args: Any, **kwargs: Any) -> Tensor:
    out = pydecode.tree_attention(*args, **kwargs)
    assert isinstance(out, Tensor)
    return out


def prime(**more: Any) -> None:
    for _ in range(2):
        args, kwargs = call(**more)
        attend(*args, **kwargs)


def test_what_differs_is_not_replayed() -> None:
    """An address that 16 bytes do not divide, other strides, a number, its kind, a tensor twice."""
    prime()
    assert len(replay._replays) == 1
    (q, k_cache, v_cache, k, v), kwargs = call()
    shifted = torch.randn(q.numel() + 1)[1:].view_as(q)
    wide = torch.randn(1, 3, 2, 32)[..., :16]
    others = [
        ((shifted, k_cache, v_cache, k, v), kwargs),
        ((wide, k_cache, v_cache, k, v), kwargs),
        ((q, k_cache, k_cache, k, v), kwargs),
        ((q, k_cache, v_cache, v, v), kwargs),
        ((q, k_cache, v_cache, k, v), dict(kwargs, window_size=4)),
        ((q, k_cache, v_cache, k, v), dict(kwargs, softcap=1.0)),
        ((q, k_cache, v_cache, k, v), dict(kwargs, cache_seqlens=torch.tensor([9]).int())),
    ]
    for count, (args, given) in enumerate(others, 1):
        got = attend(*args, **given)
        assert (len(replay._replays), len(replay._seen)) == (1, count)
        want = attend(*args, **dict(given, backend="reference"))
        torch.testing.assert_close(got, want)


def test_which_of_two_is_given_twice() -> None:
    """(q, a, a, k, k) and (q, a, b, k, k) are not one, whichever comes first."""
    for turn in range(6):
        (q, k_cache, v_cache, k, v), kwargs = call()
        args = (q, k_cache, k_cache, k, v) if turn % 2 else (q, k_cache, v_cache, k, k)
        want = attend(*args, **dict(kwargs, backend="reference"))
        torch.testing.assert_close(attend(*args, **kwargs), want)
    assert len(known()) == 2


def test_errors_stay_errors() -> None:
    """Also those of values that equal known ones: True is no window of 1."""
    prime(window_size=1)
    args, kwargs = call(window_size=True)
    with pytest.raises(ValueError, match="window_size"):
        attend(*args, **kwargs)
    args, kwargs = call(window_size=1)
    with pytest.raises(ValueError, match="k: expected shape"):
        attend(*args[:3], args[3][:, :2], args[4], **kwargs)
    with pydecode.checks(True), pytest.raises(ValueError, match="cache_seqlens"):
        attend(*args, **dict(kwargs, cache_seqlens=torch.tensor([99])))


def test_nothing_is_kept_alive_and_outputs_are_fresh() -> None:
    prime()
    args, kwargs = call()
    refs = [weakref.ref(x) for x in args]
    first = attend(*args, **kwargs)
    second = attend(*args, **kwargs)
    assert first.data_ptr() != second.data_ptr()
    del args
    gc.collect()
    assert not any(ref() is not None for ref in refs)


def test_into_memory_of_the_callers() -> None:
    """``out`` is copied into, which is no launch of ours: never replayed, always right."""
    for _ in range(3):
        args, kwargs = call()
        out = torch.full((1, 3, 2, 16), torch.nan)
        assert attend(*args, **kwargs, out=out) is out
        torch.testing.assert_close(out, attend(*args, **dict(kwargs, backend="reference")))
    assert not known()


def test_what_pytorch_computes_is_not_replayed() -> None:
    """A bool mask is packed by a kernel of PyTorch's: its replay would read old bits."""
    for _ in range(4):
        args, kwargs = call(mask=torch.rand(1, 3, 3) < 0.5)
        want = attend(*args, **dict(kwargs, backend="reference"))
        torch.testing.assert_close(attend(*args, **kwargs), want)
    assert not known()


def test_views_are_made_anew() -> None:
    """fp8 caches go to the kernel as bytes, and stacked parts one by one."""
    for _ in range(4):
        args, kwargs = call(k_scale=2.0)
        q, k_cache, v_cache, k, v = args
        eight = [x.to(torch.float8_e4m3fn) for x in (k_cache, v_cache)]
        want = attend(q, *eight, k, v, **dict(kwargs, backend="reference"))
        torch.testing.assert_close(attend(q, *eight, k, v, **kwargs), want)
        outs, lses = torch.randn(3, 1, 2, 2, 4), torch.randn(3, 1, 2, 2)
        merged = pydecode.merge_states(outs, lses, backend="triton")
        for x, y in zip(merged, pydecode.merge_states(outs, lses, backend="reference")):
            torch.testing.assert_close(x, y)
    assert len(known()) == 2


def test_numbers_that_change_every_step_push_nothing_out(monkeypatch: Any) -> None:
    monkeypatch.setattr(replay, "MOST", 8)
    prime()
    for n in range(12):
        args, kwargs = call(cache_seqlens=n)
        want = attend(*args, **dict(kwargs, backend="reference"))
        torch.testing.assert_close(attend(*args, **kwargs), want)
    assert len(known()) == 1
    assert len(replay._seen) <= 8


def test_another_thread_is_not_recorded() -> None:
    seen: list[bool] = []
    recorder = replay.Recorder(list(call()[0]))
    replay._state.recorder = recorder
    try:
        thread = threading.Thread(target=lambda: seen.append(replay.recording()))
        thread.start()
        thread.join()
    finally:
        replay._state.recorder = None
    assert seen == [False]
