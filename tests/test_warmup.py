"""warmup calls every op once with the model's sizes."""

from typing import Any

import pytest
import torch

import pydecode
from pydecode import binding
from pydecode.schemas import SCHEMAS
from pydecode.warmup import CALLS

MODEL: dict[str, Any] = dict(
    **dict(num_heads=6, num_kv_heads=2, head_dim=8, dtype=torch.bfloat16, vocab_size=11),
    device="cpu",
)


def called(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, list[tuple[Any, ...]]]:
    """The schema's arguments of every op that a warmup calls."""
    seen: dict[str, list[tuple[Any, ...]]] = {}
    original = binding.call

    def record(op: Any, run: Any, *args: Any, **out: Any) -> Any:
        seen.setdefault(op.name().removeprefix("pydecode::"), []).append(args)
        return original(op, run, *args, **out)

    with monkeypatch.context() as patch:
        patch.setattr(binding, "call", record)
        assert pydecode.warmup(**{**MODEL, **changes}) is None
    return seen


def test_every_op_has_a_call() -> None:
    assert list(CALLS) == list(SCHEMAS)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_calls_every_op_with_the_model(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.get_rng_state()
    seen = called(monkeypatch, dtype=dtype)
    assert set(seen) == set(SCHEMAS)
    q, k_cache = seen["tree_attention"][0][:2]
    assert (q.dtype, k_cache.dtype) == (dtype, dtype)
    assert (q.shape[-2:], k_cache.shape[-2:]) == ((6, 8), (2, 8))
    assert seen["rejection_sample"][0][0].shape[-1] == 11
    assert seen["rejection_sample"][0][0].dtype == dtype
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("op", CALLS)
def test_one_op_alone(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with the smallest sizes."""
    sizes = dict(num_heads=1, num_kv_heads=1, head_dim=1, vocab_size=2)
    assert op in called(monkeypatch, ops=[op], **sizes)


def test_no_ops() -> None:
    pydecode.warmup(**MODEL, ops=())


BAD_ARGUMENTS = {
    "heads": (dict(num_heads=5), ValueError, "num_heads: expected a multiple of num_kv_heads = 2"),
    "kv heads": (dict(num_kv_heads=0), ValueError, "num_kv_heads: expected an int >= 1, got 0"),
    "dim": (dict(head_dim=8.0), ValueError, "head_dim: expected an int >= 1, got 8.0"),
    "dtype": (dict(dtype=torch.int8), TypeError, "dtype: expected one of float16"),
    "vocab": (dict(vocab_size=1), ValueError, "vocab_size: expected an int >= 2, got 1"),
    "device": (dict(device="abacus"), ValueError, "device: expected a torch device, got 'abacus'"),
    "op": (
        dict(ops=["tree_attention", "flash"]),
        ValueError,
        "ops: expected names out of .*'flash'",
    ),
    "string": (dict(ops="unmask"), TypeError, "ops: expected None or several names"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_errors_name_the_argument(case: str) -> None:
    change, error, message = BAD_ARGUMENTS[case]
    with pytest.raises(error, match=message):
        pydecode.warmup(**{**MODEL, **change})
