"""The pages under docs/ are true: their snippets run."""

import doctest
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
# performance.md is made from result files; test_collect.py holds it against them.
PAGES = sorted(page for page in DOCS.glob("*.md") if page.name != "performance.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run(page: Path) -> None:
    result = doctest.testfile(str(page), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0
