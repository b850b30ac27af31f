"""``python -m pydecode.bench.static_report``: what compiled kernels hold, proven with no GPU.

Compiles every Triton kernel in every shipped configuration, with the attributes of real launches,
and every CUDA source, for all architectures, and holds each binary against ``static/rules.py``.
"""

import json
import time
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from pydecode.check.report import machine

from .static import cuda, pool
from .static.examine import Listed, Row, examine, listed
from .static.launches import modules
from .static.targets import CUDA_TARGETS, TARGETS

console = Console()
if not console.is_terminal:
    console = Console(width=200)


def report(
    kernel: Annotated[
        list[str] | None, typer.Option(help="Only this kernel; may be repeated.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Only this architecture; may be repeated.")
    ] = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="At most so many calls a kernel and target.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All calls: the default.")] = False,
    seed: Annotated[int, typer.Option(help="Which calls a sample takes.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all of it here.")] = None,
    module: Annotated[
        list[str] | None, typer.Option(help="Kernels of this module, not pydecode's.")
    ] = None,
    csrc: Annotated[Path, typer.Option(help="CUDA sources.")] = cuda.CSRC,
) -> None:
    """Compile all kernels ahead of time, and fail where a binary is not what the rule demands."""
    for name in target or ():
        if name not in TARGETS:
            raise typer.BadParameter(f"--target: expected one of {', '.join(TARGETS)}, got {name}")
    if everything and sample:
        raise typer.BadParameter("--all and --sample exclude each other")
    start = time.perf_counter()
    with pool.fresh_compiler():
        targets = target or list(TARGETS)
        calls, left_out = _calls(module or modules(), targets, jobs)
        chosen = [c for c in calls if not kernel or c.kernel in kernel]
        if kernel and (unknown := set(kernel) - {c.kernel for c in calls}):
            raise typer.BadParameter(f"--kernel: no kernel {', '.join(sorted(unknown))}")
        total = len(chosen)
        chosen = _sample(chosen, sample, seed)
        sources, skipped = ([], []) if kernel or module else _sources(csrc)
        rows = _examined(
            chosen, [(s, t) for s in sources for t in CUDA_TARGETS if t in targets], jobs
        )
    if rows:
        console.print(_table(rows))
    problems = left_out + [
        f"{r.kernel} [{r.call}] {r.target}: {fault}" for r in rows for fault in r.faults
    ]
    for line in problems:
        console.print(line, style="red", markup=False, highlight=False)
    for line in skipped:
        console.print(line, style="yellow", markup=False, highlight=False)
    if json_file is not None:
        _save(json_file, rows, problems, skipped, dict(of=total, sample=sample, seed=seed))
    seconds = time.perf_counter() - start
    console.print(_verdict(rows, problems, total - len(chosen), seconds), soft_wrap=True)
    raise typer.Exit(1 if problems else 0)


def _calls(names: list[str], targets: list[str], jobs: int) -> tuple[list[Listed], list[str]]:
    """Every static call of every module, and what the modules leave out."""
    found: dict[str, list[Listed]] = {}
    left_out: list[str] = []
    for i, result in pool.each([(listed, (name, targets)) for name in names], jobs):
        found[names[i]], missing = result or ([], ["its process died"])
        left_out += [f"{names[i]}: {line}" for line in missing]
    return [call for name in names for call in found[name]], left_out


def _sample(calls: list[Listed], n: int | None, seed: int) -> list[Listed]:
    """At most n calls of each kernel and target; another seed takes others."""
    if n is None:
        return calls
    groups: dict[tuple[str, str, str], list[Listed]] = defaultdict(list)
    for call in sorted(calls, key=lambda c: zlib.crc32(f"{c} {seed}".encode())):
        groups[call.module, call.kernel, call.target].append(call)
    return sorted(call for group in groups.values() for call in group[:n])


def _sources(csrc: Path) -> tuple[list[str], list[str]]:
    found = cuda.sources(csrc)
    if found and cuda.nvcc() is None:
        return [], [f"{len(found)} CUDA sources not compiled: nvcc is not installed"]
    return found, []


def _examined(calls: list[Listed], sources: list[tuple[str, str]], jobs: int) -> list[Row]:
    """In the order of the calls, whatever the order in which they end."""
    work: list[Any] = [(cuda.examine, place) for place in sources]
    work += [(examine, (call,)) for call in calls]
    found: dict[int, list[Row]] = {}
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("compiling", total=len(work))
        for i, result in pool.each(work, jobs):
            if result is None:
                result = _died(*sources[i]) if i < len(sources) else _died(calls[i - len(sources)])
            found[i] = result if isinstance(result, list) else [result]
            progress.advance(task)
    return [row for i in range(len(work)) for row in found[i]]


def _died(what: Any, target: str = "") -> list[Row]:
    name = what.kernel if isinstance(what, Listed) else Path(what).name
    call = f"call {what.index}" if isinstance(what, Listed) else ""
    target = target or what.target
    return [Row(name, call, target, "", None, ["the compiler's process died"], 0.0)]


def _table(rows: list[Row]) -> Table:
    result = Table(title="compiled kernels", title_justify="left")
    for name in ("kernel", "call", "target"):
        result.add_column(name, overflow="fold")
    for name in ("registers", "spills", "stack", "shared KB", "blocks/SM"):
        result.add_column(name, justify="right")
    for name in ("matrix", "asynchronous", "loads: bytes x count"):
        result.add_column(name, overflow="fold")
    result.add_column("verdict")
    for r in rows:
        b, cells = r.binary, [""] * 8
        if b is not None:
            counts = [str(n) for n in (b.registers, b.spills, b.stack)]
            loads = (f"{width}x{n}" for width, n in sorted(b.loads.items(), reverse=True))
            cells = [*counts, f"{b.shared / 1024:.1f}", str(b.blocks)]
            cells += [_pairs(b.matrix), _pairs(b.asynchronous), " ".join(loads)]
        verdict = "[red]FAILED[/red]" if r.faults else "[green]ok[/green]"
        result.add_row(*map(escape, (r.kernel, r.call, r.target, *cells)), verdict)
    return result


def _pairs(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in counts.items())


def _save(
    path: Path, rows: list[Row], problems: list[str], skipped: list[str], taken: dict[str, Any]
) -> None:
    plain = [dict(r._asdict(), binary=r.binary and r.binary._asdict()) for r in rows]
    result = dict(kind="static", machine=machine("cpu"), rows=plain, problems=problems)
    path.write_text(json.dumps(dict(result, skipped=skipped, calls=taken), indent=1) + "\n")


def _verdict(rows: list[Row], problems: list[str], unseen: int, seconds: float) -> str:
    if not rows and not problems:
        return "static report: ok, no kernel to compile yet"
    kernels = len({r.kernel for r in rows})
    targets = Counter(r.target for r in rows)
    what = f"{len(rows)} binaries of {kernels} kernels for {len(targets)} targets"
    what += f", {unseen} calls not in this sample" if unseen else ""
    word = f"[red]FAILED[/red], {len(problems)} faults" if problems else "[green]ok[/green]"
    return f"static report: {word}, {what}, {seconds:.0f} s"


def main() -> None:
    typer.run(report)


if __name__ == "__main__":
    main()
