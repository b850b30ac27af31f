"""The list of faults is up to date with the code that they change: CI runs a quarter at a time."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent
MUTANTS = runpy.run_path(str(ROOT / "tests" / "mutants" / "mutants.py"))["MUTANTS"]


def test_each_fault_has_one_place() -> None:
    places = {m.name: (ROOT / m.file).read_text().count(m.old) for m in MUTANTS}
    assert {name: n for name, n in places.items() if n != 1} == {}


def test_names_and_tests() -> None:
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)
    for m in MUTANTS:
        assert m.old != m.new, m.name
        files = [word for word in m.tests.split() if ".py" in word]
        assert files, m.name
        for file in files:
            assert (ROOT / file.split("::")[0]).is_file(), m.name
