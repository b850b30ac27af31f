"""``pydecode bench`` and ``pydecode bench compare``: the command line's part."""

import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress

import pydecode
from pydecode.check.command import expect_folder

from . import report, roof, run
from .peers import peers as all_peers
from .workload import Workload

console = Console()
if not console.is_terminal:
    console = Console(width=200)

app = typer.Typer(add_completion=False, invoke_without_command=True, rich_markup_mode="rich")


@app.callback()
def bench(
    context: typer.Context,
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be repeated.")] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="Only this backend; may be repeated.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if here.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few shapes an op.")] = False,
    peers: Annotated[bool, typer.Option(help="Time the peers as well.")] = True,
    seconds: Annotated[float, typer.Option(help="Time for each contender of a shape.")] = 1.0,
    budget: Annotated[
        float | None, typer.Option(help="Seconds for the whole run; what is left out is said.")
    ] = None,
    max_gb: Annotated[
        float | None, typer.Option(help="Leave out larger shapes; default: what fits.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the run here.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Write PNGs into this folder.")] = None,
) -> None:
    """Time every op against this machine's roof and against every peer that is installed.

    Contenders are interleaved, and ratios are paired round by round. An op whose check fails is not
    timed. On a GPU calls run as CUDA graphs over inputs that no cache holds.
    """
    if context.invoked_subcommand is not None:
        return
    here = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if device is not None and device not in here:
        raise typer.BadParameter(f"--device: expected {' or '.join(here)} here, got {device!r}")
    where = torch.device(device or here[-1])
    expect_folder("json", json_file)
    ops = _chosen("op", op, run.ops())
    names = _chosen("backend", backend, list(pydecode.backends()))
    names = [b for b in names if backend or pydecode.backends()[b].available]
    end = float("inf") if budget is None else time.monotonic() + budget
    contenders = all_peers() if peers else []
    work = in_turn(run.workloads(ops, quick=quick))
    limit = max_gb * 1e9 if max_gb is not None else _room(where)

    console.print(f"measuring the roof of {where.type}")
    top = roof.measure(where, {w.dtype for w in work if w.flops})
    console.print(", ".join([f"{top.bandwidth / 1e9:.1f} GB/s", *_rates(top)]))
    rows: list[run.Row] = []
    left_out: list[str] = []
    late: list[str] = []
    passed: dict[tuple[str, torch.dtype], dict[str, str]] = {}
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("timing", total=len(work))
        for w in work:
            progress.update(task, description=w.key)
            if time.monotonic() > end:
                late.append(w.key)
            elif 2 * w.bytes > limit:
                left_out.append(f"{w.key}: needs over {limit / 1e9:.1f} GB")
            else:
                key = (w.op, w.dtype)
                if key not in passed:
                    passed[key] = run.backends_that_pass(w, names, where)
                left_out += [f"{w.op} {b}: {why}" for b, why in passed[key].items() if why]
                usable = [b for b, why in passed[key].items() if not why]
                try:
                    new, absent = run.time_workload(
                        w, usable, contenders, top, where, seconds=seconds
                    )
                    rows += new
                    left_out += [
                        f"{b}: {why}" for b, why in absent.items() if "its check fails" in why
                    ]
                except torch.OutOfMemoryError:
                    left_out.append(f"{w.key}: out of memory")
            if where.type == "cuda":
                torch.cuda.empty_cache()
            progress.advance(task)
    console.print(report.table(rows, narrow=console.width < 140))
    left_out = sorted(set(left_out))
    if late:
        console.print(f"{len(late)} shapes left out, over the budget of {budget:.0f} s")
    for line in [*report.absences(rows), *(f"not timed: {x}" for x in left_out)]:
        console.print(line, markup=False, style="yellow")
    if json_file is not None:
        report.save(json_file, rows, top, where, left_out + [f"{k}: no time" for k in late])
    if plots is not None:
        from .plots import save_all

        machine = report.machine(where.type)
        for file in save_all(plots, dict(rows=rows, machine=machine)):
            console.print(f"plot: {file}")
    failed = [x for x in left_out if "its check fails" in x]
    console.print(f"{len(rows)} rows" + (f", {len(failed)} FAILED their check" if failed else ""))
    if failed or not rows:
        raise typer.Exit(1)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A --json file.")],
    after: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A later one.")],
) -> None:
    """Show what moved between two runs beyond the noise (ranges p20..p80 that do not touch)."""
    try:
        a, b = report.load(before), report.load(after)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if a["machine"]["device"] != b["machine"]["device"]:
        console.print(
            f"different devices: {a['machine']['device']}, then {b['machine']['device']}",
            style="yellow",
        )
    console.print(report.moved(a, b))


def _chosen(option: str, given: list[str] | None, known: list[str]) -> list[str]:
    for name in given or ():
        if name not in known:
            options = ", ".join(known)
            raise typer.BadParameter(f"--{option}: expected one of {options}, got {name!r}")
    return list(dict.fromkeys(given or known))


def in_turn(workloads: Iterable[Workload]) -> list[Workload]:
    """The few first, and every op's first before any op's second: a budget may run out."""
    work, seen = list(workloads), Counter[tuple[str, bool]]()
    places = []
    for w in work:
        places.append((not w.quick, seen[w.op, w.quick]))
        seen[w.op, w.quick] += 1
    order = sorted(range(len(work)), key=lambda i: places[i])
    return [work[i] for i in order]


def _room(device: torch.device) -> float:
    """Bytes that inputs may take: half a GPU's memory; on a CPU time runs out first."""
    return 0.5 * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 3e8


def _rates(top: roof.Roof) -> list[str]:
    return [
        f"{rate / 1e12:.2f} TFLOP/s {str(dtype).removeprefix('torch.')}"
        for dtype, rate in top.flops.items()
    ]
