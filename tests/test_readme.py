"""The README is true: its snippets run, and its support table is what calls do."""

import doctest
import os
import re
from pathlib import Path

import pytest
from examples import EXAMPLES

import pydecode
from pydecode.schemas import SCHEMAS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PUBLIC = {
    "trees.pack_mask": "pack_mask",
    "trees.mask_from_parents": "mask_from_parents",
    "trees.depths": "tree_depths",
    "trees.dynamic": "dynamic_tree",
    "trees.from_links": "tree_from_links",
    "trees.links": "tree_links",
}
HEADER, *ROWS = [
    [cell.strip(" `") for cell in line.strip("|").split("|")]
    for line in re.search(r"^\| op \|.*?(?=\n\n)", README, re.M | re.S)[0].splitlines()  # type: ignore[index]
    if not line.startswith("|---")
]


def test_snippets_run() -> None:
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert result.attempted > 15
    assert result.failed == 0


def test_table_lists_every_op_and_backend() -> None:
    assert [PUBLIC.get(row[0], row[0]) for row in ROWS] == list(SCHEMAS)
    assert set(HEADER[1:]) <= set(pydecode.backends())


@pytest.mark.parametrize(
    ("op", "backend", "here"),
    [(PUBLIC.get(r[0], r[0]), b, cell) for r in ROWS for b, cell in zip(HEADER[1:], r[1:])],
)
def test_support(op: str, backend: str, here: str) -> None:
    function, args, kwargs = EXAMPLES[op]()
    if here == "yes" and (backend != "triton" or os.environ.get("TRITON_INTERPRET") == "1"):
        function(*args, **kwargs, backend=backend)
    elif here == "yes":  # tests/triton makes the call
        with pytest.raises(pydecode.BackendUnavailable, match="'triton' cannot run this call"):
            function(*args, **kwargs, backend=backend)
    else:
        assert here == "no"
        with pytest.raises(pydecode.BackendUnavailable, match=f"no '{backend}' backend"):
            function(*args, **kwargs, backend=backend)


def modules() -> list[str]:
    """Every module of the package whose docstrings hold examples."""

    def has_examples(file: Path) -> bool:
        lines = file.read_text().splitlines()
        return any(">>> " in line and "+SKIP" not in line for line in lines)

    files = [f for f in (ROOT / "pydecode").rglob("*.py") if has_examples(f)]
    names = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files]
    return sorted(name.removesuffix(".__init__") for name in names)


@pytest.mark.parametrize("name", modules())
def test_docstring_examples_run(name: str) -> None:
    import importlib

    assert doctest.testmod(importlib.import_module(name)).failed == 0
