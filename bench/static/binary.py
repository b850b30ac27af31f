"""What a compiled kernel holds: read from SASS by the disassembler, from AMD's assembly as text."""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from .targets import Target, blocks_per_sm


class Binary(NamedTuple):
    registers: int
    spills: int  # bytes of stores to local memory, counted in the code
    stack: int  # bytes a thread
    shared: int  # bytes a block
    tensor_memory: int  # columns, sm_100
    blocks: int  # that fit an SM
    matrix: dict[str, int]  # instructions by family
    asynchronous: dict[str, int]
    loads: dict[int, int]  # from global memory, instructions by bytes a thread


FAMILIES = re.compile(r"(?:UTC)?[A-Z]{1,4}MMA")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.M)
_SECTION = re.compile(r"^\s*\.section\s+\.text\.([^,\s]+)", re.M)
_USAGE = re.compile(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_ASYNCHRONOUS = ("LDGSTS", "UTMALDG", "UBLKCP")


def read_cubin(
    cubin: bytes,
    tools: Path,
    target: Target,
    *,
    threads: dict[str, int],
    dynamic: dict[str, int],
    tensor_memory: int = 0,
) -> dict[str, Binary]:
    """Every kernel of a cubin; threads and dynamic shared memory of a block, by kernel or ""."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", file)
        sass = _run(tools / "nvdisasm", "-c", file)
    parts = _SECTION.split(sass)
    code = dict(zip(parts[1::2], parts[2::2]))
    # from sm_90 on, a kernel that has shared memory lists the system's KB with it
    reserved = 1024 if isinstance(target.arch, int) and target.arch >= 90 else 0
    found = {}
    for name, *numbers in _USAGE.findall(usage):
        registers, stack, static = map(int, numbers)
        operations = Counter(_INSTRUCTION.findall(code.get(name, "")))
        if not operations:
            raise ValueError(f"no instruction of {name} was understood")
        shared = max(0, static - reserved) + dynamic.get(name, dynamic.get("", 0))
        warps = -(-threads.get(name, threads.get("", 32)) // 32)
        found[name] = Binary(
            registers=registers,
            stack=stack,
            shared=shared,
            tensor_memory=tensor_memory,
            blocks=blocks_per_sm(target, registers, shared, warps, tensor_memory),
            **_counts(operations),
        )
    if not found:
        raise ValueError("no kernel was found in the cubin")
    return found


def _counts(operations: Counter[str]) -> dict:
    matrix: Counter[str] = Counter()
    asynchronous: Counter[str] = Counter()
    loads: Counter[int] = Counter()
    spills = 0
    for operation, n in operations.items():
        base = operation.partition(".")[0]
        if FAMILIES.fullmatch(base):
            matrix[base] += n
        if base in _ASYNCHRONOUS:
            asynchronous[base] += n
        if base in ("LDG", "LDGSTS"):
            loads[_width(operation)] += n
        if base == "STL":
            spills += _width(operation) * n
    return dict(
        matrix=dict(matrix), asynchronous=dict(asynchronous), loads=dict(loads), spills=spills
    )


def _width(operation: str) -> int:
    """Bytes a thread of ``LDG.E.128`` and its like."""
    for part, width in (("256", 32), ("128", 16), ("64", 8), ("U16", 2), ("S16", 2)):
        if part in operation.split("."):
            return width
    return 1 if {"U8", "S8"} & set(operation.split(".")) else 4


def _run(tool: Path, *arguments: object) -> str:
    done = subprocess.run([str(tool), *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool.name}: {done.stderr.strip()[:300]}")
    return done.stdout


_AMD_LOAD = re.compile(
    r"^\s+(?:buffer|global|flat)_load_(dwordx4|dwordx3|dwordx2|dword|[us]?short|[us]byte)", re.M
)
_AMD_WIDTHS = dict(dwordx4=16, dwordx3=12, dwordx2=8, dword=4, ubyte=1, sbyte=1)
_AMD_ASYNCHRONOUS = re.compile(
    r"^\s+(?:(?:buffer|global)_load_\w+ .*\blds\b|global_load_lds)", re.M
)


def read_amdgcn(text: str, target: Target, *, warps: int, shared: int) -> Binary:
    """One kernel in AMD's assembly; ``shared`` is what Triton asks for at the launch."""

    def noted(name: str) -> int:
        value = re.search(rf"^\s*-?\s*\.{name}:\s*(\d+)", text, re.M)
        if value is None:
            raise ValueError(f"the assembly does not tell its {name}")
        return int(value[1])

    registers = noted("vgpr_count")  # the accumulation registers among them
    loads = Counter(_AMD_WIDTHS.get(kind, 2) for kind in _AMD_LOAD.findall(text))
    mfma = len(re.findall(r"^\s+v_s?mfmac?_", text, re.M))
    copies = len(_AMD_ASYNCHRONOUS.findall(text))
    shared += noted("group_segment_fixed_size")
    return Binary(
        registers=registers,
        spills=4 * noted("vgpr_spill_count"),
        stack=noted("private_segment_fixed_size"),
        shared=shared,
        tensor_memory=0,
        blocks=blocks_per_sm(target, registers, shared, warps),
        matrix=dict(MFMA=mfma) if mfma else {},
        asynchronous={"load to LDS": copies} if copies else {},
        loads=dict(loads),
    )
