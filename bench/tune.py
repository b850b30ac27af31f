"""Rewrites an op's configuration table from measurements on this machine's GPU.

    python -m pydecode.bench.tune OP            sweep, and write configurations/OP.json
    python -m pydecode.bench.tune OP --dry-run  sweep only

An op, or a kernel of several, that can be tuned has, in ``triton_kernels/<op>.py``,
``CONFIGURATIONS`` and
``candidates(key)``, which yields launch keywords; and in ``bench/<op>.py`` ``tuned_by(key)``, the
workload that selects that key, or None if this machine cannot run it. A candidate must be proven by
the static report for this architecture and pass the check before it is timed. The table's own entry
stays unless another is faster beyond the noise.
"""

import argparse
import importlib
import json
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydecode.triton_kernels.configurations import FOLDER

from pydecode import replay
from pydecode.check.draw import Case
from pydecode.check.report import machine
from pydecode.check.run import check_case, public

from . import timing
from .run import size_of
from .timing import Spread
from .workload import Inputs, Workload

Launch = dict[str, Any]


class Entry(NamedTuple):
    """What came of one key."""

    key: Hashable
    launch: Launch  # the one that stays
    us: Spread | None  # None: this machine cannot run the key
    was: Spread | None  # the entry that the table had
    rejected: list[str]  # candidates that were not timed, and why


@contextmanager
def entry(table: dict[Hashable, Launch], key: Hashable, launch: Launch) -> Iterator[None]:
    """Inside, the launcher reads ``launch`` for ``key``."""
    before = table[key]
    table[key] = launch
    replay.forget()
    try:
        yield
    finally:
        table[key] = before
        replay.forget()


def sweep(
    op: str,
    kernels: Any,
    workload_of: Callable[[Hashable], Workload | None],
    device: torch.device,
    *,
    proven: Callable[[str, Hashable, Launch], str],
    backend: str = "triton",
    seconds: float = 0.5,
    say: Callable[[str], None] = print,
) -> list[Entry]:
    """Every key of a table; ``proven`` gives "" or what the static report holds against it."""
    table: dict[Hashable, Launch] = kernels.CONFIGURATIONS
    result = []
    for key, current in list(table.items()):
        workload = workload_of(key)
        if workload is None:
            result.append(Entry(key, current, None, None, []))
            continue
        args, kwargs = workload.make(device)
        sets = timing.sets_of_inputs(size_of((args, kwargs)), device)
        inputs = [(args, kwargs), *(workload.make(device) for _ in range(sets - 1))]
        rejected: list[str] = []
        contenders: dict[str, timing.Call] = {}
        launches: dict[str, Launch] = {}
        for launch in [current, *kernels.candidates(key)]:
            name = str(launch)
            if name in contenders:
                continue
            wrong = proven(op, key, launch)
            if not wrong:
                with entry(table, key, launch):
                    _, _, wrong = check_case(
                        workload.op, backend, Case(args, kwargs, workload.label)
                    )
            if wrong:
                rejected.append(f"{name}: {wrong}")
                continue
            launches[name] = launch
            contenders[name] = caller(table, key, launch, workload.op, backend, inputs)
        if str(current) not in contenders:
            raise RuntimeError(f"{op} {key}: the table's own entry fails: {rejected[0]}")
        took = timing.race(contenders, sets=sets, device=device, seconds=seconds)
        was = took.spread(str(current))
        best = min(contenders, key=lambda name: took.spread(name).median)
        if took.spread(best).p80 >= was.p20:  # within the noise: nothing moves
            best = str(current)
        result.append(Entry(key, launches[best], took.spread(best), was, rejected))
        say(
            f"{op} {key}: {was.median:.1f} us -> {took.spread(best).median:.1f} us, {best}, "
            f"{len(contenders)} timed, {len(rejected)} rejected"
        )
    return result


def caller(
    table: dict[Hashable, Launch],
    key: Hashable,
    launch: Launch,
    op: str,
    backend: str,
    inputs: list[Inputs],
) -> timing.Call:
    """The op on the i-th inputs, with ``launch`` in the table."""

    def call(i: int) -> object:
        args, kwargs = inputs[i]
        with entry(table, key, launch):
            return public(op)(*args, **kwargs, backend=backend)

    return call


def write(op: str, entries: list[Entry], device: torch.device, folder: Path = FOLDER) -> Path:
    """The table's file: every entry with its time, and where that was measured."""
    file = folder / f"{op}.json"
    old = json.loads(file.read_text())["entries"] if file.exists() else []
    measured = {tuple(e["key"]): e for e in old}
    here = machine(device.type)
    source = {name: here[name] for name in ("device", "commit", "torch", "triton", "date")}
    for e in entries:
        assert isinstance(e.key, tuple)
        if e.us is not None:
            measured[e.key] = dict(key=list(e.key), launch=e.launch, us=e.us.median, **source)
        else:  # measured elsewhere, or nowhere yet
            measured.setdefault(e.key, dict(key=list(e.key), launch=e.launch))
    lines = ",\n  ".join(json.dumps(measured[e.key]) for e in entries)
    file.write_text(f'{{"entries": [\n  {lines}\n]}}\n')
    return file


def proven_here(op: str, key: Hashable, launch: Launch) -> str:
    """What the static report holds against a candidate on this machine's architecture."""
    from .static.examine import examine, listed

    major, minor = torch.cuda.get_device_capability()
    target = f"sm_{major}{minor}"
    name = f"pydecode.triton_kernels.{op}"
    kernels = importlib.import_module(name)
    with entry(kernels.CONFIGURATIONS, key, launch):
        calls, _ = listed(name, [target])
        mine = [
            call
            for call, said in zip(calls, kernels.static_calls(target))
            if said.configuration == key
        ]
        faults = [fault for call in mine for fault in examine(call).faults]
    return faults[0] if faults else "" if mine else f"no static call for {target}"


def tunable() -> list[str]:
    """Ops whose kernels have candidates."""
    from pydecode import triton_kernels

    names = sorted(p.stem for p in Path(str(triton_kernels.__path__[0])).glob("*.py"))
    return [
        name
        for name in names
        if name not in ("__init__", "static_call")
        and hasattr(importlib.import_module(f"pydecode.triton_kernels.{name}"), "candidates")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("op", nargs="*", help="default: every op that can be tuned")
    parser.add_argument("--dry-run", action="store_true", help="write no table")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each candidate")
    parser.add_argument("--json", type=Path, help="also write what was found here")
    options = parser.parse_args()
    known = tunable()
    if unknown := set(options.op) - set(known):
        some = f"some of {', '.join(known)}" if known else "none: no kernel has a table yet"
        parser.error(f"op: expected {some}, got {unknown.pop()}")
    if not known:
        print("no kernel has a configuration table yet: nothing to tune")
        return
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device, and a table is tuned on the device it is for")
    device, found = torch.device("cuda"), {}
    for op in options.op or known:
        kernels = importlib.import_module(f"pydecode.triton_kernels.{op}")
        bench = importlib.import_module(f"{__package__}.{op}")
        entries = sweep(
            op, kernels, bench.tuned_by, device, proven=proven_here, seconds=options.seconds
        )
        found[op] = [e._asdict() for e in entries]
        if not options.dry_run:
            print(f"wrote {write(op, entries, device)}")
    if options.json:
        content = dict(kind="tune", machine=machine("cuda"), entries=found)
        options.json.write_text(json.dumps(content, indent=1, default=list) + "\n")


if __name__ == "__main__":
    main()
