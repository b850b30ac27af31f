"""The demo as a picture: accept lengths of each step, and the order of unmasking."""

from pathlib import Path
from typing import Any

from . import causal as causal_demo
from . import masked as masked_demo


def save(path: Path, causal: causal_demo.Shown | None, masked: masked_demo.Shown | None) -> None:
    """Writes one PNG with a panel for each part that ran."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    parts = [p for p in (causal, masked) if p is not None]
    figure, axes = plt.subplots(
        len(parts), 1, figsize=(10, 4.5 * len(parts)), squeeze=False, layout="constrained"
    )
    row = 0
    if causal is not None:
        _accept_lengths(axes[row][0], causal)
        row += 1
    if masked is not None:
        _order(axes[row][0], masked)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _accept_lengths(axis: Any, shown: causal_demo.Shown) -> None:
    """Tokens emitted after each forward pass: the steeper, the fewer passes."""
    styles = {"chat": "--", "rewrite": "-"}
    names = [n for p, d, n in shown.outcomes if p == "rewrite" and d == "float32"]
    names = [n for n in names if not n.startswith("HF ")]
    for prompt, style in styles.items():
        for i, name in enumerate(names):
            accepted = shown.outcomes[prompt, "float32", name].accepted
            emitted = [0]
            for a in accepted:
                emitted.append(emitted[-1] + a + 1)
            # wider below, so that methods that emit alike stay visible under each other
            axis.step(
                range(len(emitted)),
                emitted,
                style,
                where="post",
                color=f"C{i}",
                linewidth=1.5 + 1.5 * (len(names) - i - 1),
                alpha=0.8,
            )
    handles = [axis.plot([], [], color=f"C{i}", label=n)[0] for i, n in enumerate(names)]
    handles += [axis.plot([], [], s, color="k", label=p)[0] for p, s in styles.items()]
    axis.legend(handles=handles, frameon=False)
    axis.set_xlabel("forward pass")
    axis.set_ylabel("tokens emitted")
    axis.set_title("SmolLM2-135M-Instruct (fp32): tokens emitted by each forward pass")
    axis.spines[["top", "right"]].set_visible(False)


def _order(axis: Any, shown: masked_demo.Shown) -> None:
    """One row a rule: the step, as a share of all steps, at which each position was filled."""
    import numpy as np

    rows = []
    for filled in shown.by_rule.values():
        order = np.array(filled.order, dtype=float)
        last = max(order.max(), 1)
        rows.append(np.where(order == 0, np.nan, order / last))
    axis.set_facecolor("lightgrey")
    image = axis.imshow(np.array(rows), aspect="auto", cmap="viridis", vmin=0, vmax=1)
    labels = [
        f"{name}: {filled.recovered:.0%}, {filled.passes:.0f} forward"
        for name, filled in shown.by_rule.items()
    ]
    axis.set_yticks(range(len(labels)), labels)
    axis.set_xlabel("position in the first sequence (grey: given)")
    axis.set_title("sapiens: when each masked position was filled, and the recovered share")
    axis.figure.colorbar(image, ax=axis, label="filled at this share of the steps")
