"""What every adapter keeps: no peer needed, no synchronisation, little host time, one graph."""

import copy
import pkgutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from adapters import ADAPTERS, Adapter
from host_cost import host_microseconds, launches
from torch.utils import _pytree as pytree

import pydecode.compat

MODULES = sorted(
    m.name for m in pkgutil.walk_packages(pydecode.compat.__path__, "pydecode.compat.")
)
PEERS = ("flashinfer", "sgl_kernel", "sglang", "vllm", "transformers", "dinfer", "fast_dllm")
BLOCKED = f"""
import sys
for peer in {PEERS}:
    sys.modules[peer] = None  # importing it raises ImportError
for module in {MODULES}:
    __import__(module)
"""


def test_every_module_imports_without_its_peer() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def run(call: Any) -> list[torch.Tensor]:
    """Results, then arguments, which an adapter may change in place."""
    function, args, kwargs = call
    return tensors((function(*args, **kwargs), args, kwargs))


@pytest.mark.parametrize("name", [n for n, a in ADAPTERS.items() if not a.reads_data])
def test_reads_no_data(name: str) -> None:
    function, args, kwargs = ADAPTERS[name].make(3)
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda x: x.to("meta"), (args, kwargs))
    assert all(x.device.type == "meta" for x in tensors(function(*args, **kwargs)))


@pytest.mark.parametrize("name", ADAPTERS)
def test_launches_do_not_follow_the_batch(name: str) -> None:
    counts = []
    for batch in (2, 5):
        function, args, kwargs = ADAPTERS[name].make(batch)
        counts.append(launches(lambda: function(*args, **kwargs)))  # noqa: B023
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", ADAPTERS)
def test_host_time_beyond_the_op(name: str) -> None:
    """Threefold, since this machine may be slow and is shared; host_cost.py prints the figures."""
    adapter: Adapter = ADAPTERS[name]
    function, args, kwargs = adapter.make(4)
    assert host_microseconds(lambda: function(*args, **kwargs)) < 3 * adapter.budget


@pytest.mark.parametrize("name", [n for n, a in ADAPTERS.items() if not a.not_compiled])
def test_compiles_to_one_graph(name: str) -> None:
    torch._dynamo.reset()
    function, args, kwargs = ADAPTERS[name].make(3)
    # Both start from the same arguments and the same state of torch's generators.
    state = torch.get_rng_state()
    want = run((function, *copy.deepcopy((args, kwargs))))
    torch.set_rng_state(state)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got = run((compiled, args, kwargs))
    assert len(got) == len(want)
    for x, y in zip(got, want):
        torch.testing.assert_close(x, y, equal_nan=True)
