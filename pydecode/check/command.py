"""``pydecode check``: the command line's part."""

import json
import random
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

import pydecode

from . import report, run

console = Console()
if not console.is_terminal:
    console = Console(width=160)

OPS = Annotated[list[str] | None, typer.Option("--op", help="Only this op; may be repeated.")]
BACKENDS = Annotated[
    list[str] | None, typer.Option("--backend", help="Only this backend; may be repeated.")
]
DEVICES = Annotated[
    list[str] | None, typer.Option("--device", help="cpu, cuda or cuda:N; default: all there are.")
]


def check(
    op: OPS = None,
    backend: BACKENDS = None,
    device: DEVICES = None,
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", help="float16, bfloat16, float32 or float64.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Repeats a run; default: a new one.")] = None,
    cases: Annotated[int, typer.Option(min=1, help="Random cases an op and dtype.")] = 24,
    budget: Annotated[
        float | None, typer.Option(help="Seconds for the whole run; what is left out is said.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every outcome to this file.")
    ] = None,
) -> None:
    """Hold every op of every backend against the fp64 reference, on fresh random inputs.

    Errors are shares of the bound: twice the error of the same formula in PyTorch at that dtype,
    plus rounding. Caches hold NaN wherever no query may look, outputs are poisoned and lie between
    guard bands, and the last request of a batch has the same bits alone. Exit status 1 if anything
    failed, or nothing ran.
    """
    ops = _chosen("op", op, run.OPS)
    backends = _chosen("backend", backend, tuple(b for b in pydecode.backends()))
    if backend is None:
        backends = [b for b, x in pydecode.backends().items() if x.available]
    here = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    numbered = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    devices = list(dict.fromkeys(device or here))
    for name in devices:
        if name not in (*here, *numbered):
            raise typer.BadParameter(f"--device: torch sees no {name!r} here")
    expect_folder("json", json_file)
    known = {str(d).removeprefix("torch."): d for d in run.DTYPES}
    dtypes = [known[d] for d in _chosen("dtype", dtype, tuple(known))]
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    work = [
        (o, b, t, d)
        for d in devices
        for o in ops
        for t in run.dtypes(o)
        if t is None or t in dtypes
        for b in backends
    ]
    if not work:
        known_to = {o: [str(t).removeprefix("torch.") for t in run.dtypes(o)] for o in ops}
        said = ", ".join(f"{o} has {' '.join(names)}" for o, names in known_to.items())
        raise typer.BadParameter(f"--dtype: {said}")
    end = float("inf") if budget is None else time.monotonic() + budget
    outcomes, late = [], 0
    shown = track(work, f"checking, seed {seed}", console=console, disable=not console.is_terminal)
    for o, b, t, d in shown:
        if time.monotonic() > end:
            late += 1
        else:
            outcomes.append(run.check(o, b, t, d, seed=seed, cases=cases))
    narrow = console.width < 120
    console.print(report.table(outcomes, seed, narrow=narrow))
    if narrow:
        for line in report.remarks(outcomes):
            console.print(line, markup=False)
    if late:
        console.print(f"{late} of {len(work)} rows left out, over the budget of {budget:.0f} s")
    if json_file is not None:
        json_file.write_text(json.dumps(report.as_json(outcomes, seed, devices), indent=1) + "\n")
    failed = [o for o in outcomes if not o.ok]
    ran = sum(o.cases for o in outcomes)
    verdict = f"{len(failed)} FAILED" if failed else "ok" if ran else "nothing ran"
    console.print(f"{ran} cases, seed {seed}: {verdict}")
    if failed or not ran:
        raise typer.Exit(1)


def _chosen(option: str, given: list[str] | None, known: tuple[str, ...]) -> list[str]:
    for name in given or ():
        if name not in known:
            raise typer.BadParameter(
                f"--{option}: expected one of {', '.join(known)}, got {name!r}"
            )
    return list(dict.fromkeys(given or known))


def expect_folder(option: str, file: Path | None) -> None:
    """Before minutes of work: the file's folder is there."""
    if file is not None and not file.absolute().parent.is_dir():
        raise typer.BadParameter(f"--{option}: no such folder: {file.parent}")
