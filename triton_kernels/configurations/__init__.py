"""Configuration tables: one JSON file a kernel module, read once, at import.

A module says ``CONFIGURATIONS = configurations.load("tree_attention")``. ``bench/tune.py`` rewrites
a file from measurements and notes the device and the commit; there is no tuning at run time.
"""

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def load(name: str, folder: Path = FOLDER) -> dict[Hashable, dict[str, Any]]:
    """Key (a tuple, as the launcher looks it up) -> launch keywords."""
    entries = json.loads((folder / f"{name}.json").read_text())["entries"]
    return {tuple(entry["key"]): dict(entry["launch"]) for entry in entries}
