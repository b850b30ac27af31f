"""Files the results of a run and remakes docs/performance.md from all that are filed.

    python -m pydecode.bench.collect FOLDER      FOLDER: what bench/device.sh left under $OUT
    python -m pydecode.bench.collect             only remakes the page

Results lie under ``bench/results/<device>/<commit>-<stage>.json``. Every number on the page comes
from such a file; a cell without one says "not measured yet".
"""

import argparse
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from . import report, run
from .families import FAMILIES
from .run import Row
from .workload import Workload

ROOT = Path(__file__).resolve().parents[1]
NOT_YET = "not measured yet"

HEAD = """# Performance

<!-- made by `python -m pydecode.bench.collect`: every number is from a file in bench/results -->

How to read it: median microseconds of a call, in brackets the share of the roof (the least time
that the bytes and products of the call need at the copy bandwidth and the matrix rate that were
measured in the same run) and the backend. Under a device's own heading stands each peer's time as a
multiple of ours, in the same run, losses included. `pydecode bench` makes such a run on your
machine.
"""
# Columns that the page has before anyone has measured there.
AWAITED = ("NVIDIA H100 80GB HBM3", "NVIDIA H200")


def file_results(folder: Path, results: Path) -> list[Path]:
    """Copies the JSON files of a run to where they belong; returns the new paths."""
    filed = []
    for file in sorted(folder.glob("*.json")):
        try:
            content = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file}: expected JSON: {error}") from error
        machine = content.get("machine") or (content.get("machines") or [None])[-1]
        if machine is None:  # a stage that says nothing about a device
            continue
        place = results / slug(machine["device"])
        place.mkdir(parents=True, exist_ok=True)
        commit = (machine["commit"] or "unknown").replace("+", "-changed")
        filed.append(Path(shutil.copy(file, place / f"{commit}-{file.name}")))
    return filed


def slug(device: str) -> str:
    """A folder's name: lower case, words joined by dashes."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def runs(results: Path) -> Iterator[dict[str, Any]]:
    """Every filed run of the benchmarks, oldest first, with its path."""
    files = [f for f in results.rglob("*.json") if _kind(f) == "bench"]
    for file in sorted(files, key=lambda f: json.loads(f.read_text())["machine"].get("date") or ""):
        yield dict(report.load(file), path=file)


def _kind(file: Path) -> str:
    content = json.loads(file.read_text())
    return content.get("kind", "") if isinstance(content, dict) else ""


def page(results: Path, workloads: Iterable[Workload]) -> str:
    """docs/performance.md."""
    latest: dict[str, dict[str, tuple[Row, dict[str, Any]]]] = {}  # device -> row's key -> newest
    for one in runs(results):
        rows = latest.setdefault(one["machine"]["device"], {})
        rows.update({row.key: (row, one) for row in one["rows"]})
    workloads = list(workloads)
    parts = [HEAD, *_summary(latest, workloads)]
    for device, rows in latest.items():
        parts += _device(device, rows, results)
    return "\n".join(parts) + "\n"


def _summary(latest: dict[str, Any], workloads: list[Workload]) -> Iterator[str]:
    """One table a family: a line a shape, a column a device, the fastest backend's time."""
    devices = list(dict.fromkeys([*AWAITED, *latest]))
    for title, ops in FAMILIES:
        yield f"\n## {title}\n"
        yield "| op | shape | dtype | " + " | ".join(devices) + " |"
        yield "|---|---|---|" + "---|" * len(devices)
        for w in workloads:
            if w.op in ops:
                cells = [_cell(w, latest.get(device, {})) for device in devices]
                dtype = str(w.dtype).removeprefix("torch.")
                yield f"| `{w.op}` | {w.label} | {dtype} | " + " | ".join(cells) + " |"


def _cell(w: Workload, rows: dict[str, tuple[Row, dict[str, Any]]]) -> str:
    mine = [row for row, _ in rows.values() if f"{row.op} {row.label} {row.dtype}" == w.key]
    if not mine:
        return NOT_YET
    best = min(mine, key=lambda row: row.us.median)
    return f"{best.us.median:,.1f} ({best.share_of_roof:.0%}, {best.backend})"


def _device(device: str, rows: dict[str, Any], results: Path) -> Iterator[str]:
    """The machine, its roofs, its files, and the peers."""
    files = {one["path"]: one for _, one in rows.values()}
    yield f"\n## {device}\n"
    for path, one in files.items():
        m, roof = one["machine"], one["roof"]
        rates = ", ".join(f"{x / 1e12:.2f} TFLOP/s {d}" for d, x in roof["flops"].items())
        where = f"[{path.name}](../bench/results/{path.relative_to(results).as_posix()})"
        yield (
            f"- {where}: commit {m['commit']}, torch {m['torch']}, triton {m['triton']}, CUDA "
            f"{m['cuda'] or 'none'}; roof {roof['bandwidth'] / 1e9:,.1f} GB/s"
            + (f", {rates}" if rates else "")
        )
    yield "\n| op | shape | backend | us [p20, p80] | times longer than ours |"
    yield "|---|---|---|---|---|"
    for row, _ in rows.values():
        ratios = ", ".join(
            f"{name} {r.median:.2f} [{r.p20:.2f}, {r.p80:.2f}]" for name, r in row.ratios.items()
        )
        us = f"{row.us.median:,.1f} [{row.us.p20:,.1f}, {row.us.p80:,.1f}]"
        yield f"| `{row.op}` | {row.label} | {row.backend} | {us} | {ratios or '-'} |"
    for picture in sorted((results / slug(device)).glob("*.png")):
        yield f"\n![{picture.stem}](../bench/results/{slug(device)}/{picture.name})"


def pictures(results: Path) -> None:
    """One set of pictures a device, of the newest row of each shape."""
    from .plots import save_all

    newest: dict[str, dict[str, Row]] = {}
    machines = {}
    for one in runs(results):
        device = one["machine"]["device"]
        machines[device] = one["machine"]
        newest.setdefault(device, {}).update({row.key: row for row in one["rows"]})
    for device, rows in newest.items():
        save_all(results / slug(device), dict(machine=machines[device], rows=list(rows.values())))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="what bench/device.sh left")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to write into")
    options = parser.parse_args()
    results = options.root / "bench" / "results"
    if options.folder is not None:
        if not options.folder.is_dir():
            parser.error(f"folder: expected what bench/device.sh left, got {options.folder}")
        filed = file_results(options.folder, results)
        for path in filed:
            print(f"filed {path.relative_to(options.root)}")
        if not filed:
            parser.error(f"folder: no results in {options.folder}")
    pictures(results)
    target = options.root / "docs" / "performance.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(results, run.workloads(run.ops(), quick=False)))
    print(f"wrote {target.relative_to(options.root)}")


if __name__ == "__main__":
    main()
