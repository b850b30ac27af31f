"""The command line: ``pydecode info``, ``demo``, ``check`` and ``bench``.

Typer and Rich come with ``pip install 'pydecode[cli]'``; without them one line says so.
"""

import importlib.metadata
import importlib.util
import platform
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch

import pydecode

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError:  # the console script is installed with or without the extra
    sys.exit("pydecode: the command line needs: pip install 'pydecode[cli]'")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
)
console = Console()
if not console.is_terminal:  # in a log file, tables need not fold at 80 columns
    console = Console(width=132)


from .bench.command import app as bench  # noqa: E402  (these need rich)
from .check.command import check  # noqa: E402

app.command()(check)
app.add_typer(bench, name="bench")


class Model(str, Enum):
    """The demo's two models."""

    smollm2 = "smollm2"
    sapiens = "sapiens"


def _version(asked: bool) -> None:
    if asked:
        console.print(pydecode.__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Parallel decoding primitives: tree attention, block diffusion, verification, unmasking."""


@app.command()
def info() -> None:
    """Print versions, devices, and backends with the reason for each missing one."""
    table = Table("what", "version", title="versions", title_justify="left")
    table.add_row("pydecode", pydecode.__version__)
    table.add_row("python", platform.python_version())
    for package in ("torch", "triton", "numpy", "transformers"):
        if importlib.util.find_spec(package) is None:
            table.add_row(package, "[yellow]not installed[/yellow]")
        else:
            table.add_row(package, importlib.metadata.version(package))
    console.print(table)

    table = Table("device", "what it is", title="devices", title_justify="left")
    table.add_row("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads for torch")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            memory = f"{gpu.total_memory / 2**30:.0f} GiB"
            table.add_row(f"cuda:{i}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {memory}")
    else:
        table.add_row("cuda", "[yellow]torch sees none[/yellow]")
    console.print(table)

    table = Table("backend", "here", "what it is, or why it is missing", title="backends")
    table.title_justify = "left"
    for name, backend in pydecode.backends().items():
        table.add_row(
            name,
            "[green]yes[/green]" if backend.available else "[yellow]no[/yellow]",
            backend.reason,
        )
    console.print(table)


@app.command()
def demo(
    tokens: Annotated[int, typer.Option(min=1, help="New tokens a prompt.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds, interleaved.")] = 3,
    only: Annotated[Model | None, typer.Option(help="One model; default: both.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG of both decoders here.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="Torch threads; 0: as torch chose.")] = 0,
    backend: Annotated[
        str | None, typer.Option(help="SmolLM2's attention; default: the fastest there is.")
    ] = None,
) -> None:
    """Decode several tokens a step with two real models, and compare with plain decoding.

    SmolLM2-135M-Instruct answers two prompts by plain, chain and tree decoding; sapiens, a masked
    language model of antibodies, fills masked positions in parallel under several rules.
    """
    if threads:
        torch.set_num_threads(threads)
    from .models import ModelMissing

    causal = masked = None
    try:
        if only != Model.sapiens:
            from .demo import causal as causal_demo

            causal = causal_demo.show(
                console, max_new_tokens=tokens, rounds=rounds, backend=backend
            )
        if only != Model.smollm2:
            from .demo import masked as masked_demo

            masked = masked_demo.show(console)
    except (pydecode.BackendUnavailable, ModelMissing) as missing:
        # no markup: [models] in the message is an extra, not a style
        console.print(str(missing), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    if plot is not None:
        from .demo.plots import save

        save(plot, causal, masked)
        console.print(f"\nplot: {plot}")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
