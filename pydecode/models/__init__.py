"""Small trained models from PyPI, for demonstrations and tests: no hub is ever asked.

``smollm2`` is a causal language model of 135 M parameters, ``sapiens`` a masked language model over
antibody sequences. Their packages are no dependencies; a missing one raises ``ModelMissing``, whose
message says what to install.
"""

import importlib.util
from pathlib import Path


class ModelMissing(RuntimeError):
    """A model's package is not installed; the message is one line that says what to install."""


def package_folder(package: str, install: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelMissing(f"{package} is not installed; install it with: {install}")
    return Path(next(iter(spec.submodule_search_locations)))
