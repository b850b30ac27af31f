"""Compiles one CUDA source for one target and holds each of its kernels against the rule.

A source says what its kernels are in comments, one line an instantiation or a family of them:

    // static: scores<__half, 64> dtype=float16 m=64 stages=3 threads=128 shared=81920

First a regular expression that matches the demangled kernel (it may hold spaces), then what a
launch has: threads and dynamic shared memory of a block, and the rule's arguments (``StaticCall``).
"""

import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import pydecode

from .binary import read_cubin
from .examine import TOOLS, Row
from .rules import expected, faults
from .targets import TARGETS, Target

CSRC = Path(pydecode.__file__).parents[1] / "csrc"
_LINE = re.compile(r"^\s*//\s*static:\s*(.+?)((?:\s+\w+=\S+)+)\s*$", re.M)


def sources(folder: Path = CSRC) -> list[str]:
    return sorted(map(str, folder.rglob("*.cu"))) if folder.is_dir() else []


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def examine(source: str, target_name: str) -> list[Row]:
    file, target = Path(source), TARGETS[target_name]
    start = time.perf_counter()

    def row(kernel: str, found: list[str], want: object = "", has: Any = None) -> Row:
        seconds = time.perf_counter() - start
        return Row(kernel, file.name, target.name, str(want), has, found, seconds)

    try:
        lines = [(regex, _arguments(words)) for regex, words in _LINE.findall(file.read_text())]
        cubin = _compile(file, target)
        names = _kernels(cubin)
        told: dict[str, dict[str, Any]] = {}
        rows = []
        for mangled, name in names.items():
            matching = [arguments for regex, arguments in lines if re.search(regex, name)]
            if len(matching) == 1:
                told[mangled] = matching[0]
            else:
                rows.append(row(name, [f"{len(matching)} `// static:` lines match, expected one"]))
        rows += [
            row(regex, ["this `// static:` line matches no kernel"])
            for regex, _ in lines
            if not any(re.search(regex, name) for name in names.values())
        ]
        binaries = read_cubin(
            cubin,
            TOOLS,
            target,
            threads={m: a["threads"] for m, a in told.items()},
            dynamic={m: a["shared"] for m, a in told.items()},
        )
        for mangled, arguments in told.items():
            rule = {k: v for k, v in arguments.items() if k != "shared"}
            want = expected(target=target, **rule)
            has = binaries[mangled]
            rows.append(row(names[mangled], faults(want, has, target), want, has))
        return rows or [row(file.stem, ["no kernel in this source"])]
    except Exception as error:  # whatever the compiler or a wrong line raises is a finding
        return [row(file.stem, [f"{type(error).__name__}: {str(error)[:300]}"])]


def _arguments(words: str) -> dict[str, Any]:
    """``dtype=bfloat16 m=64`` and so on, all but ``threads`` with StaticCall's defaults."""
    given = dict(word.split("=", 1) for word in words.split())
    found: dict[str, Any] = dict(m=None, stages=1, streamed=0, aligned=True, shared=0)
    for name, value in given.items():
        if name == "dtype":
            found[name] = getattr(torch, value)
        elif name == "aligned":
            found[name] = value == "True"
        elif name in ("m", "stages", "streamed", "shared", "threads"):
            found[name] = int(value)
        else:
            raise ValueError(f"static: {name} is unknown")
    if missing := {"dtype", "threads"} - set(found):
        raise ValueError(f"static: a line without {', '.join(sorted(missing))}")
    return found


def _compile(file: Path, target: Target) -> bytes:
    compiler = nvcc()
    assert compiler is not None  # the caller has asked
    include = [CSRC, Path(torch.__file__).parent / "include"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernels.cubin"
        command = [compiler, "-cubin", f"-arch={target.nvcc}", "-std=c++17", "-O3", "-o", str(out)]
        command += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
        command += [f"-I{folder}" for folder in include]
        done = subprocess.run([*command, str(file)], capture_output=True, text=True)
        if done.returncode:
            lines = [x for x in done.stderr.splitlines() if "error" in x] or [done.stderr]
            raise RuntimeError(f"nvcc: {lines[0]}")
        return out.read_bytes()


def _kernels(cubin: bytes) -> dict[str, str]:
    """Mangled to demangled name of every kernel (as it is where c++filt is not installed)."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernels.cubin"
        out.write_bytes(cubin)
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", str(out)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = re.findall(r"Function (\S+):", usage)
    demangle = shutil.which("c++filt")
    if demangle is None or not names:
        return {n: n for n in names}
    done = subprocess.run([demangle, *names], capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.splitlines()))
