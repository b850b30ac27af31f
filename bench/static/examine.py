"""Compiles one launch for one target and holds its binary against the rule."""

import contextlib
import importlib
import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton
from pydecode.triton_kernels.static_call import StaticCall
from triton.backends import nvidia
from triton.compiler import ASTSource

from .binary import Binary, read_amdgcn, read_cubin
from .launches import Specialised, gaps, gpu_target, launch_of, specialise, static_calls
from .rules import expected, faults
from .targets import TARGETS, Target

TOOLS = Path(nvidia.__file__).parent / "bin"


class Row(NamedTuple):
    kernel: str
    call: str  # the table's key, and what is special about the call
    target: str
    expected: str
    binary: Binary | None
    faults: list[str]
    seconds: float


class Listed(NamedTuple):
    """One static call by its place, for processes to pass around."""

    module: str
    target: str
    index: int
    kernel: str


def listed(module_name: str, targets: list[str]) -> tuple[list[Listed], list[str]]:
    """A module's static calls, and what they leave out."""
    try:
        module = importlib.import_module(module_name)
        left_out = gaps(module)
        calls = [
            Listed(module_name, name, i, call.kernel.__name__)
            for name in targets
            if hasattr(module, "static_calls")
            for i, call in enumerate(static_calls(module, TARGETS[name]))
        ]
    except Exception as error:  # whatever a kernel's module raises is a finding
        return [], [_line(error)]
    return calls, left_out


def examine(place: Listed) -> Row:
    module = importlib.import_module(place.module)
    target = TARGETS[place.target]
    call = static_calls(module, target)[place.index]
    want, has, found = None, None, []
    start = time.perf_counter()
    try:
        made = specialise(launch_of(call, module.CONFIGURATIONS), target)
        want = expectation(call, made, target)
        if not call.aligned and all_aligned(made):
            found.append("declared aligned=False, but every pointer and stride is aligned")
        with contextlib.redirect_stdout(io.StringIO()):  # a failed ptxas prints the whole PTX
            has = compiled(made, target)
        found += faults(want, has, target)
    except Exception as error:  # and so is whatever the compiler raises
        found.append(_line(error))
    seconds = time.perf_counter() - start
    return Row(place.kernel, label(call), target.name, str(want or ""), has, found, seconds)


def expectation(call: StaticCall, made: Specialised, target: Target) -> Any:
    stages = call.stages
    if stages is None:
        stages = made.options.num_stages if call.m is not None else 1
    return expected(
        call.dtype,
        call.m,
        target,
        stages=stages,
        streamed=call.streamed,
        aligned=call.aligned,
        threads=made.options.num_warps * target.warp_size,
    )


def all_aligned(made: Specialised) -> bool:
    """Whether nothing is odd: every pointer, and every integer called a stride, divides by 16."""
    for i, (name, kinds) in enumerate(made.signature.items()):
        several = isinstance(kinds, tuple)
        names = getattr(kinds, "_fields", None) or (name,) * (len(kinds) if several else 1)
        for j, kind in enumerate(kinds if several else (kinds,)):
            counts = kind.startswith("*") or ("stride" in names[j] and kind.startswith("i"))
            known = made.attributes.get((i, j) if several else (i,)) or ()
            if counts and not any(attribute == "tt.divisibility" for attribute, _ in known):
                return False
    return True


def compiled(made: Specialised, target: Target) -> Binary:
    source = ASTSource(made.kernel, made.signature, made.constants, made.attributes)
    kernel = triton.compile(source, target=gpu_target(target), options=made.options.__dict__)
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    if target.backend == "hip":
        return read_amdgcn(kernel.asm["amdgcn"], target, warps=warps, shared=shared)
    binaries = read_cubin(
        kernel.asm["cubin"],
        TOOLS,
        target,
        threads={"": warps * 32},
        dynamic={"": shared},
        tensor_memory=kernel.metadata.tmem_size or 0,
    )
    (binary,) = binaries.values()
    return binary


def label(call: StaticCall) -> str:
    key = call.configuration
    parts: Mapping | tuple = key if isinstance(key, tuple) else (key,)
    words = [str(part).removeprefix("torch.") for part in parts]
    return " ".join(words + ([call.note] if call.note else []))


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}"
