"""What a run of the benchmarks leaves: a table, a JSON file, and pictures."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from pydecode.check.report import machine

from .roof import Roof
from .run import Row
from .timing import Spread


def table(rows: Iterable[Row], *, narrow: bool = False) -> Table:
    """One line a row; ``narrow`` has fewer columns, not fewer digits (the rest is in the JSON)."""
    result = Table(title="bench", title_justify="left")
    if narrow:
        result.add_column("call", overflow="fold")
        for name in ("us", "of roof"):
            result.add_column(name, justify="right", no_wrap=True)
        result.add_column("peers: times longer than ours", overflow="fold")
        for row in rows:
            result.add_row(
                f"{row.key}",
                f"{row.us.median:.1f}",
                f"{row.share_of_roof:.1%}",
                "\n".join(f"{name} {ratio.median:.2f}" for name, ratio in row.ratios.items()),
            )
        return result
    for name in ("op", "shape", "dtype", "backend"):
        result.add_column(name, overflow="fold")
    for name in ("us", "p20..p80", "GB/s", "TFLOP/s", "of roof", "launches", "host us"):
        result.add_column(name, justify="right")
    result.add_column("peers: times longer than ours", overflow="fold")
    for row in rows:
        ratios = [f"{name} {ratio.median:.2f}" for name, ratio in row.ratios.items()]
        result.add_row(
            *(row.op, row.label, row.dtype, row.backend),
            f"{row.us.median:.1f}",
            f"{row.us.p20:.1f}..{row.us.p80:.1f}",
            f"{row.gb_per_s:.3g}",
            f"{row.tflop_per_s:.3g}" if row.tflop_per_s else "",
            f"{row.share_of_roof:.1%}",
            "" if row.launches is None else str(row.launches),
            "" if row.host_us is None else f"{row.host_us:.1f}",
            ", ".join(ratios),
        )
    return result


def absences(rows: Iterable[Row]) -> list[str]:
    """Who did not run and why, each reason once."""
    return sorted({f"{name}: {why}" for row in rows for name, why in row.absent.items()})


def save(
    path: Path, rows: list[Row], roof: Roof, device: torch.device, left_out: list[str]
) -> None:
    """Everything, for ``compare`` and for docs/performance.md."""
    result = dict(
        kind="bench",
        machine=machine(device.type),
        roof=dict(
            bandwidth=roof.bandwidth,
            flops={str(d).removeprefix("torch."): rate for d, rate in roof.flops.items()},
        ),
        rows=[
            dict(row._asdict(), us=row.us._asdict(), ratios=_spreads(row.ratios)) for row in rows
        ],
        left_out=left_out,
    )
    path.write_text(json.dumps(result, indent=1) + "\n")


def load(path: Path) -> dict[str, Any]:
    """A saved run; ``rows`` are ``Row`` again."""
    try:
        result = json.loads(path.read_text())
        rows = [
            Row(
                **dict(
                    row,
                    us=Spread(**row["us"]),
                    ratios={n: Spread(**s) for n, s in row["ratios"].items()},
                )
            )
            for row in result["rows"]
        ]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected a file of `pydecode bench --json`: {error}") from error
    return dict(result, rows=rows)


def _spreads(ratios: dict[str, Spread]) -> dict[str, dict[str, float]]:
    return {name: ratio._asdict() for name, ratio in ratios.items()}


def moved(before: dict[str, Any], after: dict[str, Any]) -> Table:
    """Rows of two runs side by side; one has moved if the ranges p20..p80 do not touch."""
    result = Table(title="compare", title_justify="left")
    for name in ("op and shape", "backend"):
        result.add_column(name, overflow="fold")
    for name in ("before us", "after us", "after / before"):
        result.add_column(name, justify="right")
    result.add_column("verdict")
    old = {row.key: row for row in before["rows"]}
    new = {row.key: row for row in after["rows"]}
    for key in [*old, *(k for k in new if k not in old)]:
        a, b = old.get(key), new.get(key)
        row = b or a
        assert row is not None
        cells = [f"{row.op} {row.label} {row.dtype}", row.backend]
        if a is None or b is None:
            result.add_row(
                *cells, *("-" if x is None else f"{x.us.median:.1f}" for x in (a, b)), ""
            )
            continue
        verdict = "within the noise"
        if b.us.p20 > a.us.p80:
            verdict = "[red]slower[/red]"
        elif b.us.p80 < a.us.p20:
            verdict = "[green]faster[/green]"
        ratio = b.us.median / a.us.median
        result.add_row(*cells, f"{a.us.median:.1f}", f"{b.us.median:.1f}", f"{ratio:.2f}", verdict)
    return result
