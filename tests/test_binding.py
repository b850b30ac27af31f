"""What every op keeps: its schema, opcheck, torch.compile, autograd, and the backends' errors."""

import inspect
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from examples import EXAMPLES
from torch.utils import _pytree as pytree

import pydecode
from pydecode import binding
from pydecode.schemas import OUT_OVERLOADS, SCHEMAS, argument_names


def recorded(op: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, tuple[Any, ...]]:
    """The registered op and the schema's arguments that the example's public call ends in."""
    seen = []
    original = binding.call

    def record(op: Any, run: Any, *args: Any, **out: Any) -> Any:
        seen.append((op, args))
        return original(op, run, *args, **out)

    function, args, kwargs = EXAMPLES[op]()
    with monkeypatch.context() as patch:
        patch.setattr(binding, "call", record)
        function(*args, **kwargs)
    return next((o, a) for o, a in seen if o.name() == f"pydecode::{op}")


def tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def test_every_schema_has_an_example() -> None:
    assert set(EXAMPLES) == set(SCHEMAS)


@pytest.mark.parametrize("op", SCHEMAS)
def test_opcheck(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registered, args = recorded(op, monkeypatch)
    torch.library.opcheck(registered, args)


@pytest.mark.parametrize("op", OUT_OVERLOADS)
def test_opcheck_of_the_out_overload(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registered, args = recorded(op, monkeypatch)
    overload = getattr(torch.ops.pydecode, op).out
    names = [a.name for a in overload._schema.arguments if a.kwarg_only]
    results = [torch.empty_like(x) for x in registered(*args)]
    overload(*args, **dict(zip(names, results)))
    for got, want in zip(results, registered(*args)):
        torch.testing.assert_close(got, want, equal_nan=True, rtol=0, atol=0)
    torch.library.opcheck(overload, args, dict(zip(names, results)))


@pytest.mark.parametrize("op", SCHEMAS)
def test_schema_names_are_the_backends_names(op: str) -> None:
    module = __import__(f"pydecode.reference.{op}", fromlist=[op])
    assert [*inspect.signature(getattr(module, op)).parameters, "backend"] == argument_names(op)


@pytest.mark.parametrize("op", SCHEMAS)
def test_compiles_as_one_graph(op: str) -> None:
    torch._dynamo.reset()  # else one lambda for all ops meets the limit of recompilations
    function, args, kwargs = EXAMPLES[op]()
    # a mutated argument must start equal in both calls
    again = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    want = function(*args, **kwargs)
    compiled = torch.compile(
        lambda args, kwargs: function(*args, **kwargs), fullgraph=True, backend="aot_eager"
    )
    got = compiled(*again)
    for x, y in zip(tensors((got, again)), tensors((want, args, kwargs))):
        torch.testing.assert_close(x, y, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("op", SCHEMAS)
def test_forward_only(op: str) -> None:
    function, args, kwargs = EXAMPLES[op]()
    args, kwargs = pytree.tree_map_only(
        torch.Tensor,
        lambda x: x.clone().requires_grad_() if x.is_floating_point() else x,
        (args, kwargs),
    )
    assert not any(x.requires_grad for x in tensors(function(*args, **kwargs)))


@pytest.mark.parametrize("op", SCHEMAS)
def test_results_are_fresh(op: str) -> None:
    function, args, kwargs = EXAMPLES[op]()
    held = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs)) if x.numel()}
    results = [x for x in tensors(function(*args, **kwargs)) if x.numel()]
    assert not any(x.untyped_storage().data_ptr() in held for x in results)


@pytest.mark.parametrize("op", SCHEMAS)
def test_backends_run_or_raise(op: str) -> None:
    function, args, kwargs = EXAMPLES[op]()
    with pytest.raises(pydecode.BackendUnavailable, match=f"{op} has no 'cuda' backend"):
        function(*args, **kwargs, backend="cuda")
    with pytest.raises(ValueError, match="backend: expected None or one of"):
        function(*args, **kwargs, backend="cudnn")


def steps(name: str) -> Any:
    """A call with the Python number(s) of step i, as a server makes them."""
    logits, drafts = torch.randn(2, 4, 20), torch.randint(20, (2, 3))
    q, kv, cache = torch.randn(1, 2, 2, 8), torch.randn(1, 2, 2, 8), torch.randn(1, 64, 2, 8)
    tokens = torch.full((2, 4), 19)
    return {
        "seed, offset, positions": lambda i: pydecode.rejection_sample(
            logits, drafts, seed=i, offset=2 * i, positions=3 * i
        ),
        "temperature, top_p, num_drafts": lambda i: pydecode.rejection_sample(
            logits, drafts, temperature=0.5 + i / 7, top_p=0.5 + i / 50, num_drafts=i % 4
        ),
        "verify_greedy": lambda i: pydecode.verify_greedy(
            drafts, logits, rule="typical", temperature=0.3 + i
        ),
        "cache_seqlens": lambda i: pydecode.tree_attention(
            q, cache, cache, kv, kv, cache_seqlens=i + 2
        ),
        "threshold, k": lambda i: pydecode.unmask(
            tokens, logits, mask_id=19, rule="threshold", threshold=i / 20, offset=i
        ),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "seed, offset, positions",
        "temperature, top_p, num_drafts",
        "verify_greedy",
        "cache_seqlens",
        "threshold, k",
    ],
)
def test_new_numbers_do_not_recompile(name: str) -> None:
    """Twenty steps with other Python numbers: a few graphs, and the eager results."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = steps(name)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for i in range(20):
        for x, y in zip(tensors(compiled(i)), tensors(function(i))):
            torch.testing.assert_close(x, y, equal_nan=True, rtol=0, atol=0)
    assert counter.frame_count <= 5
