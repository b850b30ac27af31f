"""What no interpreted kernel shows: barriers, binaries that a batch changes, other compilers."""

import ast
import importlib
import inspect
import re
from typing import Any

import pytest
from test_static_report import run

pytest.importorskip("triton", reason="compiles with Triton")
from pydecode.bench.static.launches import modules, static_calls
from pydecode.bench.static.targets import TARGETS

BATCHES = """
import sys, torch, pydecode
backends = sys.modules["pydecode.backends"]
from pydecode.bench.static.launches import recorded, specialise
from pydecode.bench.static.targets import TARGETS
backends._interpreted = lambda: True  # CPU tensors are let in, for nothing runs
V, i64 = 8192, torch.int64
def rows(B, R):
    return torch.zeros(1, 1, V, dtype=torch.bfloat16).expand(B, R, V)
def states(B):
    return torch.zeros(B, 5, 9, dtype=i64)
def calls(B, n):
    ids, nodes, each = (torch.zeros(B, *s, dtype=i64) for s in ((4,), (60,), ()))
    graph, kwargs = torch.zeros(B, 5, 5, dtype=torch.bool), dict(backend="triton")
    numbers = dict(seed=n, offset=n, positions=n, **kwargs)
    tree = lambda rule: pydecode.rejection_sample_tree(
        rows(B, 60), nodes, nodes, draft_logits=rows(B, 60), max_depth=8, rule=rule, **numbers)
    yield lambda: pydecode.rejection_sample(
        rows(B, 5), ids, rows(B, 4), top_p=each.float(), rule="block", num_drafts=n % 4, **numbers)
    yield lambda: tree("recursive")
    yield lambda: tree("traversal")
    yield lambda: pydecode.verify_greedy(
        nodes, rows(B, 60), parents=nodes, rule="typical", num_drafts=each, **kwargs)
    yield lambda: pydecode.verify_states(
        states(B), states(B), mask_id=n, graph=graph, rule="subset", **kwargs)
    yield lambda: pydecode.unmask(
        torch.zeros(B, n, dtype=i64), rows(B, n), mask_id=3, min_commit=n, max_commit=n, **kwargs)
    yield lambda: pydecode.coupled_accept(
        rows(B, 8), rows(B, 8), ids.repeat(1, 2), seed=n, offset=n, **kwargs)
binaries = {}
for B in (1, 2, 16, 33, 300):
    for n in (1, 2, 16, 33):
        for turn, call in enumerate(calls(B, n)):
            with recorded() as launches:
                call()
            for launch in launches:
                made = specialise(launch, TARGETS["sm_90"])
                binaries.setdefault((turn, made.kernel.__name__), set()).add(made.exact)
many = {name: len(found) for name, found in binaries.items() if len(found) > 1}
print(many or f"one each of {len({turn for turn, _ in binaries})}")
"""


def test_one_binary_for_all_batches() -> None:
    """Batch, seeds, offsets, positions and limits never compile anew in the middle of serving."""
    done = run(["-c", BATCHES])
    assert done.stdout.strip() == "one each of 7", done.stdout + done.stderr[-3000:]


BARRIER = """
import triton
from triton.compiler import ASTSource
from pydecode.bench.static.launches import gpu_target, launch_of, specialise, static_calls
from pydecode.bench.static.targets import TARGETS
from pydecode.triton_kernels import rejection_sample as module
target = TARGETS["sm_90"]
call = [c for c in static_calls(module, target) if c.kernel.__name__ == "decide"][-1]
made = specialise(launch_of(call, module.CONFIGURATIONS), target)
source = ASTSource(made.kernel, made.signature, made.constants, made.attributes)
lines = triton.compile(source, target=gpu_target(target), options=made.options.__dict__)
lines = lines.asm["ttir"].splitlines()
(counts,) = [n for n, line in enumerate(lines) if "tt.atomic_rmw" in line]
stores = max(n for n, line in enumerate(lines[:counts]) if "tt.store" in line)
print([len(x) - len(x.lstrip()) for x in lines[stores:counts] if "barrier" in x][:1])
"""


def test_a_program_alone_waits_for_its_sums() -> None:
    """The barrier between the last store of ``decide`` and its loads is under no condition."""
    done = run(["-c", BARRIER])
    assert done.stdout.strip() == "[4]", done.stdout + done.stderr[-3000:]


def functions(module: Any) -> list[ast.FunctionDef]:
    """Those of a module that Triton compiles."""
    found = [node for node in ast.walk(ast.parse(inspect.getsource(module)))
             if isinstance(node, ast.FunctionDef)]  # fmt: skip
    return [f for f in found if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)]


def constants(function: ast.FunctionDef) -> list[str]:
    return [a.arg for a in function.args.args if "constexpr" in ast.unparse(a.annotation or a)]


@pytest.mark.parametrize("name", modules())
def test_triton_36_takes_it(name: str) -> None:
    """It compiles no function that returns a None, no tuple compared with None, no list with a
    field of a constant, and no name for a NamedTuple whose defaults are left to it."""
    module = importlib.import_module(name)
    jitted = functions(module)
    for function in jitted:
        for node in ast.walk(function):
            if isinstance(node, ast.Return) and node.value is not None:
                indices = [
                    ast.walk(x.slice) for x in ast.walk(node) if isinstance(x, ast.Subscript)
                ]
                seen = set(ast.walk(node)) - {x for index in indices for x in index}
                values = [x.value for x in seen if isinstance(x, ast.Constant)]
                assert None not in values, (function.name, ast.unparse(node))
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                made = getattr(module, ast.unparse(node.value.func), None)
                names = getattr(made, "_fields", ())
                assert len(names) in (0, len(node.value.args)), (function.name, ast.unparse(node))
            if isinstance(node, ast.List):
                fields = [x for x in node.elts if isinstance(x, ast.Attribute)]
                assert not any(ast.unparse(x.value) in constants(function) for x in fields)
    if not hasattr(module, "static_calls"):
        return
    for call in static_calls(module, TARGETS["sm_90"]):
        for argument, value in call.arguments.items():
            if isinstance(value, tuple):
                compared = re.search(rf"\b{argument} is (not )?None", call.kernel.src)
                assert not compared, (call.kernel.__name__, argument)


@pytest.mark.parametrize("name", modules())
def test_every_launch_can_be_replayed(name: str) -> None:
    """By ``replay.launch``: a replay would leave out a kernel that is launched without it."""
    for node in ast.walk(ast.parse(inspect.getsource(importlib.import_module(name)))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            called = getattr(importlib.import_module(name), ast.unparse(node.func.value), None)
            assert not hasattr(called, "arg_names"), ast.unparse(node)[:80]
