"""Tuning picks the fastest right configuration, and leaves the table alone within the noise."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydecode.bench import merge_states as merge
from pydecode.bench import tune
from pydecode.triton_kernels import configurations

import pydecode
from pydecode.check import run as checking

CPU = torch.device("cpu")
KEY = ("float32", "sm_90")
SLOW, FAST, SAME, WRONG, SPILLS = ({"block": n} for n in (1, 2, 3, 4, 5))


def kernels(**more: Any) -> Any:
    """A kernel module whose launcher reads its table, as ours do."""
    options = [FAST, SAME, WRONG, SPILLS]
    return SimpleNamespace(CONFIGURATIONS={KEY: dict(SLOW)}, candidates=lambda key: options, **more)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``merge_states`` with a backend that does as its configuration says."""
    module = kernels()

    def merge_states(outs: Any, lses: Any, *, backend: str, **more: Any) -> Any:
        out, lse = pydecode.merge_states(outs, lses, **more)
        if backend == "triton":
            launch = module.CONFIGURATIONS[KEY]
            time.sleep(0.001 if launch == FAST else 0.03)
            if launch == WRONG:
                out += 1
        return out, lse

    for place in (checking, tune):
        monkeypatch.setattr(place, "public", lambda op: merge_states)
    return module


def proven(op: str, key: Any, launch: Any) -> str:
    return "spills 8 bytes" if launch == SPILLS else ""


def sweep(module: Any, workload: Any, seconds: float = 0.05) -> tune.Entry:
    said: list[str] = []
    (entry,) = tune.sweep(
        *("merge_states", module, lambda key: workload, CPU),
        proven=proven,
        seconds=seconds,
        say=said.append,
    )
    assert len(said) == (workload is not None)
    return entry


def test_the_fastest_right_one_wins(made_up: Any) -> None:
    entry = sweep(made_up, merge.workload(2, 1, 4, 2, 16, torch.float32))
    assert entry.launch == FAST
    assert entry.us is not None
    assert entry.was is not None
    assert entry.us.median < entry.was.median
    assert ["times the bound" in entry.rejected[0], "spills" in entry.rejected[1]] == [True] * 2
    assert made_up.CONFIGURATIONS == {KEY: SLOW}  # put back; the file is what changes


def test_the_noise_moves_nothing(made_up: Any) -> None:
    made_up.candidates = lambda key: [SAME]
    workload = merge.workload(2, 1, 4, 2, 16, torch.float32)
    assert sweep(made_up, workload, seconds=1.0).launch == SLOW  # enough samples to have a spread


def test_another_machines_keys_stay(made_up: Any) -> None:
    assert sweep(made_up, None) == tune.Entry(KEY, SLOW, None, None, [])


def test_a_table_whose_own_entry_is_wrong_is_an_error(made_up: Any) -> None:
    made_up.CONFIGURATIONS[KEY] = dict(WRONG)
    with pytest.raises(RuntimeError, match="own entry fails"):
        sweep(made_up, merge.workload(2, 1, 4, 2, 16, torch.float32))


def test_the_file(made_up: Any, tmp_path: Path) -> None:
    other = tune.Entry(("float16", "sm_80"), dict(SAME), None, None, [])
    entry = sweep(made_up, merge.workload(2, 1, 4, 2, 16, torch.float32))
    file = tune.write("merge_states", [entry, other], CPU, tmp_path)
    first, second = json.loads(file.read_text())["entries"]
    assert first["us"] == entry.us.median  # type: ignore[union-attr]
    assert first["device"]
    assert "us" not in second  # never measured, so no figure
    assert configurations.load("merge_states", tmp_path) == {KEY: FAST, other.key: SAME}
    # a later run on a machine that cannot run the first key keeps its figure
    tune.write("merge_states", [entry._replace(us=None), other], CPU, tmp_path)
    assert json.loads(file.read_text())["entries"][0] == first


def test_nothing_to_tune_yet(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.argv", ["tune"])
    monkeypatch.setattr(tune, "tunable", lambda: [])
    tune.main()
    assert "nothing to tune" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["tune", "nonsense"])
    with pytest.raises(SystemExit):
        tune.main()
