"""Runs the mutants: each fault is put into a copy of the package, and its tests must fail there.

    python tests/mutants/run.py                 all of them
    python tests/mutants/run.py --quarter 2     every fourth one, from the third on
    python tests/mutants/run.py -k traversal    those whose name holds a word

A mutant that survives fails the run; so does one whose line is no longer there, or whose tests do
not run at all.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
COPIED = ("pydecode", "triton_kernels", "tests", "pyproject.toml", "README.md", "docs")
KILLED = 1  # pytest's exit status for "tests ran, and some failed"
SECONDS = 300


def run(mutant: Mutant) -> str:
    """ "" if the tests notice the fault, else what is wrong."""
    text = (ROOT / mutant.file).read_text()
    if text.count(mutant.old) != 1:
        return f"stale: its line occurs {text.count(mutant.old)} times in {mutant.file}"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, copy / name, ignore=ignored)
            elif source.exists():
                shutil.copy(source, copy / name)
        # installed as pydecode.triton_kernels; found here, before an editable install's own
        (copy / "pydecode" / "triton_kernels").symlink_to(copy / "triton_kernels")
        (copy / mutant.file).write_text(text.replace(mutant.old, mutant.new))
        environment = dict(os.environ, PYTHONPATH=folder, OMP_NUM_THREADS="1", **dict(mutant.env))
        pytest = [sys.executable, "-c", RUN_PYTEST, folder, "-x", "-q", "-p", "no:cacheprovider"]
        try:
            done = subprocess.run(
                [*pytest, *mutant.tests.split()],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return f"its tests took over {SECONDS} s"
    if done.returncode == KILLED:
        return ""
    if done.returncode == 0:
        return "survived"
    return f"its tests did not run:\n{(done.stdout + done.stderr)[-1500:]}"


# Not ``python -m pytest``: the current folder is no part of what users import.
RUN_PYTEST = """
import sys
folder = sys.argv.pop(1)
import pydecode, pytest
import pydecode.triton_kernels
for module in (pydecode, pydecode.triton_kernels):
    assert module.__file__.startswith(folder), module.__file__
sys.exit(pytest.main(sys.argv[1:]))
"""


def chosen(quarter: int | None, word: str) -> list[Mutant]:
    picked = MUTANTS
    if quarter is not None:  # interpreted kernels are slow: they are for a run of all
        picked = [m for m in MUTANTS if not m.env][quarter % 4 :: 4]
    return [m for m in picked if word in m.name]


def main() -> int:
    parser = argparse.ArgumentParser(description="Put known faults in; the tests must notice.")
    parser.add_argument("--quarter", type=int, help="run every fourth mutant, from this one on")
    parser.add_argument("-k", default="", metavar="WORD", help="only names that hold this word")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    survivors, start = [], time.perf_counter()
    mutants = chosen(options.quarter, options.k)
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutant, wrong in zip(mutants, pool.map(run, mutants)):
            print(f"{wrong or 'killed':10} {mutant.name}", flush=True)
            survivors += [mutant] if wrong else []
    took = time.perf_counter() - start
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} mutants killed in {took:.0f} s")
    return 1 if survivors or not mutants else 0


if __name__ == "__main__":
    sys.exit(main())
