"""The table and the JSON of a check, and the machine that it ran on."""

import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import pydecode

from .run import Outcome


def machine(device: str) -> dict[str, Any]:
    """What a figure or a verdict was made on; every result file begins with it."""
    line: dict[str, Any] = dict(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        device=_device_name(device),
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        triton=metadata.version("triton") if util.find_spec("triton") else None,
        driver=_driver() if device != "cpu" else None,
        pydecode=pydecode.__version__,
        commit=_commit(),
    )
    if device == "cpu":
        line["threads"] = torch.get_num_threads()
    return line


def _device_name(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (info.read_text().splitlines() if info.exists() else ())
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.machine()} x{len(names) or 1}"


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _first_line(query)


def _commit() -> str | None:
    """The checkout's commit, with a + behind it where files differ from it; None if installed.

    ``PYDECODE_COMMIT`` says it for an installed copy, as bench/device.sh does.
    """
    if said := os.environ.get("PYDECODE_COMMIT"):
        return said
    root = Path(pydecode.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    commit = _first_line(["git", "-C", str(root), "rev-parse", "HEAD"])
    changed = _first_line(["git", "-C", str(root), "status", "--porcelain"])
    return commit and commit[:12] + ("+" if changed else "")


def _first_line(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout else None


def table(outcomes: Iterable[Outcome], seed: int, *, narrow: bool = False) -> Table:
    """One row an op, backend, dtype and device; ``narrow``: without the cases' arguments."""
    result = Table(title=f"check, seed {seed}", title_justify="left")
    for name in ("op", "backend", "dtype", "device"):
        result.add_column(name, overflow="fold")
    result.add_column("cases", justify="right")
    result.add_column("error / bound", justify="right", overflow="fold")
    result.add_column("verdict", overflow="fold")
    if not narrow:
        result.add_column("worst case, or what failed", overflow="fold")
    for o in outcomes:
        if o.skipped:
            verdict, what = "[yellow]not run[/yellow]", o.skipped
        elif o.ok:
            verdict, what = "[green]ok[/green]", o.worst_case
        else:
            verdict, what = f"[red]{len(o.failures)} failed[/red]", o.failures[0]
        if o.at_margin:
            what += f" ({o.at_margin} requests decided otherwise, within rounding)"
        share = "exact" if o.worst == 0 else f"{o.worst:.2f}"
        share = "" if o.skipped else share
        # an error text may hold brackets, which are no markup
        cells = [o.op, o.backend, o.dtype, o.device, str(o.cases), share, verdict]
        result.add_row(*cells, *([] if narrow else [what.replace("[", r"\[")]))
    return result


def remarks(outcomes: Iterable[Outcome]) -> list[str]:
    """What a narrow table has no room for: what failed, and what did not run."""
    return [
        f"{o.op}, {o.backend}, {o.dtype}, {o.device}: {[*o.failures, o.skipped][0]}"
        for o in outcomes
        if o.failures or o.skipped
    ]


def as_json(outcomes: Iterable[Outcome], seed: int, devices: Iterable[str]) -> dict[str, Any]:
    rows = [
        dict(o._asdict(), ok=o.ok, worst=None if o.worst == torch.inf else o.worst)
        for o in outcomes
    ]
    return dict(machines=[machine(d) for d in devices], seed=seed, outcomes=rows)
