"""Times one workload: our backends beside each other and beside every peer that is here."""

import importlib
import pkgutil
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import pydecode
from pydecode import BackendUnavailable
from pydecode.check.draw import Case
from pydecode.check.run import check, check_case, public

from . import timing
from .peers import Peer, Unsupported
from .roof import Roof
from .timing import Spread
from .workload import Inputs, Workload


class Row(NamedTuple):
    """One line of the table: a workload on one backend."""

    op: str
    label: str
    dtype: str
    backend: str
    us: Spread
    gb_per_s: float
    tflop_per_s: float
    share_of_roof: float
    ratios: dict[str, Spread]  # peer -> how many times longer it takes than this backend
    absent: dict[str, str]  # peer -> why it did not run
    launches: int | None
    host_us: float | None
    eager: list[str]  # contenders that were not captured in a graph

    @property
    def key(self) -> str:
        return f"{self.op} {self.label} {self.dtype} {self.backend}"


def workloads(ops: list[str], *, quick: bool) -> Iterator[Workload]:
    """The workloads of these ops, in the order of the files."""
    for op in ops:
        module: Any = importlib.import_module(f"{__package__}.{op}")
        yield from (w for w in module.workloads() if w.quick or not quick)


def ops() -> list[str]:
    """The ops that have a file here, in the order of the schemas."""
    files = {info.name for info in pkgutil.iter_modules([str(Path(__file__).parent)])}
    return [op for op in pydecode.schemas.SCHEMAS if op in files]


def backends_that_pass(
    workload: Workload, names: list[str], device: torch.device
) -> dict[str, str]:
    """Each backend with "" or why it is not timed: it is not here, or its check fails."""
    result = {}
    for name in names:
        dtype = workload.dtype if workload.dtype.is_floating_point else None
        seed = random.SystemRandom().randrange(2**31)
        done = check(workload.op, name, dtype, device.type, seed=seed, cases=4)
        if done.skipped:
            result[name] = done.skipped
        else:
            result[name] = "" if done.ok else f"its check fails: {done.failures[0]}"
    return result


def time_workload(
    workload: Workload,
    backends: list[str],
    peers: list[Peer],
    roof: Roof,
    device: torch.device,
    *,
    seconds: float,
) -> tuple[list[Row], dict[str, str]]:
    """One row a backend, and who did not run and why; raises what the inputs raise (memory)."""
    one_set = workload.make(device)
    sets = timing.sets_of_inputs(size_of(one_set), device)
    inputs = [one_set, *(workload.make(device) for _ in range(sets - 1))]
    contenders: dict[str, timing.Call] = {}
    absent: dict[str, str] = {}
    function = public(workload.op)

    def ours(name: str) -> timing.Call:
        return lambda i: function(*inputs[i][0], **inputs[i][1], backend=name)

    for name in backends:
        try:
            ours(name)(0)
        except BackendUnavailable as reason:
            absent[name] = str(reason)
            continue
        wrong = wrong_here(workload, name, one_set)
        if wrong:
            absent[name] = wrong
        else:
            contenders[name] = ours(name)
    timed = list(contenders)
    for peer in peers:
        if workload.op in peer.ops:
            call = prepared(peer, workload, inputs)
            if isinstance(call, str):
                absent[peer.name] = call
            else:
                contenders[peer.name] = call
    if not timed:
        return [], absent
    took = timing.race(contenders, sets=sets, device=device, seconds=seconds)
    rows = []
    for name in timed:
        us = took.spread(name)
        rows.append(
            Row(
                workload.op,
                workload.label,
                str(workload.dtype).removeprefix("torch."),
                name,
                us,
                workload.bytes / us.median / 1e3,
                workload.flops / us.median / 1e6,
                roof.floor(workload.bytes, workload.flops, workload.dtype) / us.median,
                {p: took.ratio(p, name) for p in contenders if p not in timed},
                absent,
                timing.launches(contenders[name], device),
                timing.host_microseconds(contenders[name], device) or None,
                sorted(took.eager) if device.type == "cuda" else [],
            )
        )
    return rows, absent


LARGEST_CHECKED = 2**27  # bytes: in fp64 that is four times as much, and scores beside it


def wrong_here(workload: Workload, backend: str, inputs: Inputs) -> str:
    """ "" or what is wrong at the very shape that is timed; the reference is its own judge."""
    if backend == "reference" or workload.bytes > LARGEST_CHECKED:
        return ""
    _, _, wrong = check_case(workload.op, backend, Case(*inputs, workload.label))
    return wrong and f"its check fails at {workload.label}: {wrong}"


def prepared(peer: Peer, workload: Workload, inputs: list[Inputs]) -> timing.Call | str:
    """The peer's call, which has run once on each set of inputs; or why there is none."""
    if peer.missing:
        return peer.missing
    try:
        calls: list[Callable[[], object]] = [
            peer.ops[workload.op](*args, **kwargs) for args, kwargs in inputs
        ]
        for call in calls:
            call()
    except Unsupported as reason:
        return str(reason)
    except Exception as error:  # a peer that fails is a result as well
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    return lambda i: calls[i]()


def size_of(inputs: Inputs) -> int:
    """Bytes of all tensors of a call."""
    leaves = torch.utils._pytree.tree_leaves(inputs)
    return sum(x.numel() * x.element_size() for x in leaves if isinstance(x, torch.Tensor))
