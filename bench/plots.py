"""Pictures of a run: a roofline a family of ops, and bars of the ratio to each peer."""

from pathlib import Path
from typing import Any

import matplotlib

from .families import FAMILIES
from .run import Row

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def save_all(folder: Path, run: dict[str, Any]) -> list[Path]:
    """All pictures of a run into a folder; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for family, ops in FAMILIES:
        rows = [row for row in run["rows"] if row.op in ops]
        if rows:
            files += [
                roofline(folder / f"roofline_{family.lower()}.png", family, rows, run),
                ratios(folder / f"peers_{family.lower()}.png", family, rows, run),
            ]
    return files


def roofline(path: Path, family: str, rows: list[Row], run: dict[str, Any]) -> Path:
    """Share of the roof against bytes moved: every op of a family in one picture."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for op, backend in sorted({(row.op, row.backend) for row in rows}):
        mine = [row for row in rows if (row.op, row.backend) == (op, backend)]
        megabytes = [row.gb_per_s * row.us.median / 1e3 for row in mine]
        shares = [100 * row.share_of_roof for row in mine]
        axes.plot(megabytes, shares, "o", alpha=0.8, label=f"{op} ({backend})")
    axes.axhline(100, color="black", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="MB that must be moved", ylabel="% of the roof")
    axes.set_title(f"{family} on {run['machine']['device']}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def ratios(path: Path, family: str, rows: list[Row], run: dict[str, Any]) -> Path:
    """Bars of how many times longer each peer takes; left of 1 the peer is faster."""
    bars = [
        (f"{row.op} {row.label} ({row.backend})\n{name}", ratio)
        for row in rows
        for name, ratio in row.ratios.items()
    ]
    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.34 * max(len(bars), 1)), layout="constrained")
    at = range(len(bars))
    middle = [ratio.median for _, ratio in bars]
    low = [ratio.median - ratio.p20 for _, ratio in bars]
    high = [ratio.p80 - ratio.median for _, ratio in bars]
    colors = ["tab:green" if x >= 1 else "tab:red" for x in middle]
    widths = [x - 1 for x in middle]  # bars begin where both are equal
    axes.barh(at, widths, left=1, color=colors, alpha=0.8)
    axes.errorbar(middle, at, xerr=[low, high], fmt="none", ecolor="black", lw=0.8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(list(at), [name for name, _ in bars], fontsize=6)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="times longer than ours (red: the peer is faster)")
    axes.set_title(f"{family} on {run['machine']['device']}")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
