"""Results are filed where they belong, and the page holds no number that is in no file."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pydecode.bench import collect, run
from pydecode.bench.timing import Spread

ROOT = Path(__file__).parents[1]
WORKLOADS = list(run.workloads(run.ops(), quick=True))


def result(path: Path, microseconds: dict[str, float], commit: str = "abc", **machine: Any) -> Path:
    """A file as ``pydecode bench --json`` leaves it."""
    spread = lambda x: Spread(x, x - 1, x + 1)._asdict()  # noqa: E731
    rows = [
        dict(
            run.Row(
                *(w.op, w.label, str(w.dtype).removeprefix("torch."), "triton"),
                *(spread(microseconds[w.key]), 1.0, 2.0, 0.5, {"eager": spread(3.0)}),
                *({}, 2, 10.0, []),
            )._asdict()
        )
        for w in WORKLOADS
        if w.key in microseconds
    ]
    facts = dict(device="NVIDIA H100 80GB HBM3", commit=commit, torch="2.11", triton="3.6")
    content = dict(
        kind="bench",
        machine=dict(facts, cuda="13.0", date="2026-01-01", **machine),
        roof=dict(bandwidth=3e12, flops={"bfloat16": 8e14}),
        rows=rows,
        left_out=[],
    )
    path.write_text(json.dumps(content))
    return path


def test_nothing_measured(tmp_path: Path) -> None:
    text = collect.page(tmp_path, WORKLOADS)
    assert text.count(collect.NOT_YET) == len(collect.AWAITED) * len(WORKLOADS)
    assert "us [p20" not in text


def test_a_run_is_filed_and_shown(tmp_path: Path) -> None:
    out, results = tmp_path / "out", tmp_path / "results"
    out.mkdir()
    key = WORKLOADS[0].key
    result(out / "bench.json", {key: 1234.5})
    (out / "build.json").write_text('{"kind": "build", "sources": 0}')  # of no device
    (filed,) = collect.file_results(out, results)
    assert filed == results / "nvidia-h100-80gb-hbm3" / "abc-bench.json"
    text = collect.page(results, WORKLOADS)
    assert "1,234.5 (50%, triton)" in text
    assert "eager 3.00 [2.00, 4.00]" in text
    assert "(../bench/results/nvidia-h100-80gb-hbm3/abc-bench.json)" in text
    assert text.count(collect.NOT_YET) == 2 * len(WORKLOADS) - 1


def test_the_newest_figure_of_a_shape_counts(tmp_path: Path) -> None:
    place = tmp_path / "nvidia-h100-80gb-hbm3"
    place.mkdir()
    first, second = (w.key for w in WORKLOADS[:2])
    result(place / "b.json", {first: 100.0, second: 200.0}, "old")
    newer = json.loads(result(place / "a.json", {first: 90.0}, "new").read_text())
    newer["machine"]["date"] = "2026-02-01"
    (place / "a.json").write_text(json.dumps(newer))
    text = collect.page(tmp_path, WORKLOADS)
    assert " 90.0 (" in text
    assert " 100.0 (" not in text
    assert " 200.0 (" in text


def test_the_page_is_what_its_files_make_it() -> None:
    """docs/performance.md cannot be edited by hand: it is remade here."""
    everything = run.workloads(run.ops(), quick=False)
    assert (ROOT / "docs" / "performance.md").read_text() == collect.page(
        ROOT / "bench" / "results", everything
    )


def test_links_of_the_page_exist() -> None:
    text = (ROOT / "docs" / "performance.md").read_text()
    for link in re.findall(r"\]\((\.\./[^)]+)\)", text):
        assert (ROOT / "docs" / link).exists(), link


def test_a_device_run_without_a_device(tmp_path: Path) -> None:
    """The script's stages, budget and results, rehearsed on a CPU."""
    import sys

    environment = dict(os.environ, OUT=str(tmp_path), DEVICE="cpu", PYTHON=sys.executable)
    environment.update(BUDGET="200", CASES="2", OMP_NUM_THREADS="1")
    script = str(ROOT / "bench" / "device.sh")
    command = ["bash", script, "build", "check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    last = done.stdout.splitlines()[-1]
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-1000:]
    assert last == "all stages ok", done.stdout[-2000:] + done.stderr[-1000:]
    assert json.loads((tmp_path / "check.json").read_text())["outcomes"]
    assert (tmp_path / "build.json").exists()
    filed = collect.file_results(tmp_path, tmp_path / "results")
    assert {f.name.rpartition("-")[2] for f in filed} == {"build.json", "check.json"}


def test_an_unknown_stage_runs_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["bash", str(ROOT / "bench" / "device.sh"), "build", "nonsense"]
    environment = dict(os.environ, OUT=str(out))
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "unknown stage: nonsense\n")
    assert not out.exists()


def test_what_cannot_be_filed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (tmp_path / "none", tmp_path):  # not there; nothing in it
        monkeypatch.setattr("sys.argv", ["collect", str(folder), "--root", str(tmp_path)])
        with pytest.raises(SystemExit) as stopped:
            collect.main()
        assert stopped.value.code == 2
    assert not (tmp_path / "docs").exists()


def test_usage() -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "bench" / "device.sh")], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "STAGE" in done.stdout


@pytest.mark.parametrize("text", ["[]", '{"kind": "other"}'])
def test_other_files_are_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    assert list(collect.runs(tmp_path)) == []
