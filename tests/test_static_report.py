"""The static report: what it reads from binaries, and that each kind of fault fails it."""

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the static report compiles with Triton")
pytest.importorskip("typer", reason="the command line needs pydecode[cli]")
from pydecode.bench import static_report
from pydecode.bench.static import binary, cuda, pool
from pydecode.bench.static.examine import Listed
from pydecode.bench.static.rules import Expected, expected
from pydecode.bench.static.targets import TARGETS, blocks_per_sm

HERE = Path(__file__).parent
HALF, FP32 = torch.bfloat16, torch.float32


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """In a process of its own: this one may have loaded Triton's interpreter."""
    keep = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(HERE), *filter(None, [keep.get("PYTHONPATH")])])  # a mutant's copy
    environment = dict(keep, PYTHONPATH=path, COLUMNS="300", OMP_NUM_THREADS="1")
    command = [sys.executable, *command]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/")


def report(*arguments: str) -> tuple[int, str]:
    done = run(["-m", "pydecode.bench.static_report", *arguments])
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The reports of the good and of the faulty kernels, made once for all of xdist's workers."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    done = folder / "static" / "done.json"
    try:
        done.parent.mkdir()
    except FileExistsError:
        while not done.exists():
            time.sleep(0.5)
        return json.loads(done.read_text())
    runs = dict(
        static_kernels=("sm_80", "sm_90", "sm_100", "gfx942"), static_faults=("sm_86", "sm_90")
    )
    result = {}
    for module, targets in runs.items():
        file = done.parent / f"{module}.json"
        options = [f"--target={target}" for target in targets]
        code, text = report("--module", module, *options, "--json", str(file))
        saved = json.loads(file.read_text()) if file.exists() else None
        result[module] = dict(code=code, text=text, saved=saved)
    done.with_suffix(".new").write_text(json.dumps(result))
    done.with_suffix(".new").rename(done)
    return result


def of(run: dict[str, Any], kernel: str, call: str, target: str) -> dict[str, Any]:
    key = (kernel, call, target)
    (row,) = [r for r in run["saved"]["rows"] if (r["kernel"], r["call"], r["target"]) == key]
    return row


def test_kernels_that_keep_the_rule_pass(both: dict[str, Any]) -> None:
    good = both["static_kernels"]
    assert good["code"] == 0, good["text"][-2000:]
    last = good["text"].strip().splitlines()[-1]
    assert last.startswith("static report: ok, 21 binaries of 3 kernels for 4 targets")
    assert good["saved"]["machine"]["triton"]
    assert all(r["binary"]["registers"] > 8 and r["expected"] for r in good["saved"]["rows"])


@pytest.mark.parametrize(
    ("call", "target", "matrix", "copies", "loads"),
    [
        ("bfloat16 16", "sm_80", "HMMA", "LDGSTS", "16"),
        ("bfloat16 16", "sm_90", "HMMA", "LDGSTS", "16"),
        ("bfloat16 64", "sm_80", "HMMA", "LDGSTS", "16"),
        ("bfloat16 64", "sm_90", "HGMMA", "LDGSTS", "16"),
        ("bfloat16 64", "sm_100", "UTCHMMA", "LDGSTS", "16"),
        ("bfloat16 64", "gfx942", "MFMA", None, "16"),
        ("float32 16", "sm_90", None, "LDGSTS", "16"),
        ("float32 16 odd stride", "sm_90", None, "LDGSTS", "4"),  # 4 bytes still copy
    ],
)
def test_what_is_read_from_a_binary(
    both: dict[str, Any], call: str, target: str, matrix: str | None, copies: str | None, loads: str
) -> None:
    has = of(both["static_kernels"], "scores", call, target)["binary"]
    assert list(has["matrix"]) == [matrix] * bool(matrix)
    assert list(has["asynchronous"]) == [copies] * bool(copies)
    assert max(has["loads"], key=int) == loads
    assert has["spills"] == has["stack"] == 0
    assert has["shared"] > 0
    assert has["blocks"] > 0


def test_tensor_descriptors_are_bulk_copies(both: dict[str, Any]) -> None:
    has = of(both["static_kernels"], "boxes", "box", "sm_90")["binary"]
    assert list(has["asynchronous"]) == ["UTMALDG"]


@pytest.mark.parametrize(
    ("kernel", "call", "target", "fault"),
    [
        ("scores", "spills", "sm_86", r"spills [1-9]\d* bytes, stack [1-9]\d* bytes"),
        ("scores", "shared", "sm_86", r"1\d\d\.\d KB of shared memory, sm_86 has 99 KB a block"),
        ("scores", "odd", "sm_90", "no asynchronous copy"),
        ("scores", "odd", "sm_90", "0 loads of 16 bytes, expected 1"),
        ("total", "odd row", "sm_90", "0 loads of 16 bytes, expected 4"),
        ("total", "masked row", "sm_90", "0 loads of 16 bytes, expected 4"),
        ("scores", "even", "sm_90", "declared aligned=False, but .* is aligned"),
        ("scores", "small", "sm_90", "expected HGMMA, has HMMA"),
        ("scores", "large", "sm_90", "expected HMMA, has HGMMA"),
        ("scores", "one stage", "sm_90", "no asynchronous copy"),
        ("scores", "typed again", "sm_90", r".*\['BM'\] come from CONFIGURATIONS.*"),
        ("scores", "unknown", "sm_90", ".*num_stagess.*"),
        ("scores", "dtype", "sm_90", ".*no rule for dots of torch.float8_e5m2.*"),
        ("scores", "no such entry", "sm_90", ".*is not in CONFIGURATIONS"),
    ],
)
def test_each_fault_fails(
    both: dict[str, Any], kernel: str, call: str, target: str, fault: str
) -> None:
    bad = both["static_faults"]
    assert bad["code"] == 1
    faults = of(bad, kernel, call, target)["faults"]
    assert any(re.fullmatch(fault, found) for found in faults), faults
    assert f"{kernel} [{call}] {target}: " in bad["text"]
    assert "static report: FAILED" in bad["text"].strip().splitlines()[-1]


def test_what_is_never_compiled_fails(both: dict[str, Any]) -> None:
    problems = both["static_faults"]["saved"]["problems"]
    left_out = [p.partition(": ")[2] for p in problems if p.startswith("static_faults: ")]
    assert left_out == [
        "kernel forgotten is never compiled",
        "CONFIGURATIONS['never compiled'] is never compiled",
    ]


COVERAGE = """
import torch, static_kernels as ours
from pydecode.bench.static.launches import recorded, uncovered
from pydecode.bench.static.targets import TARGETS
def missing(m, dtype=torch.bfloat16, offset=0, **exact):
    with recorded() as launches:
        q, k = (torch.zeros(n * 64 + 8, dtype=dtype)[offset:][:n * 64].view(n, 64) for n in (m, 80))
        ours.launch_scores(q, k)
    assert len(launches) == 1
    return len(uncovered(launches, TARGETS["sm_90"], "static_kernels", **exact))
assert missing(16) == missing(64) == 0
assert missing(16, exact=True) == 0
assert missing(16, offset=1) == 0  # the same table entry ...
assert missing(16, offset=1, exact=True) == 1  # ... but pointers of 2 bytes are another binary
ours.CONFIGURATIONS["float16", 16] = ours.CONFIGURATIONS["bfloat16", 16]
assert missing(16, torch.float16) == 1  # a dtype that no static call has
ours.CONFIGURATIONS["bfloat16", 32] = dict(ours.CONFIGURATIONS["bfloat16", 16], BM=32)
assert missing(32) == 1  # an entry that no static call has
print("covered")
"""


def test_launches_outside_the_report_are_found() -> None:
    done = run(["-c", COVERAGE])
    assert done.stdout.strip() == "covered", done.stderr[-2000:]


@pytest.mark.skipif(cuda.nvcc() is None, reason="needs nvcc")
def test_cuda_sources(tmp_path: Path) -> None:
    (tmp_path / "rows.cu").write_text((HERE / "static_rows.cu").read_text())
    file = tmp_path / "out.json"
    arguments = ["--csrc", str(tmp_path), "--target", "sm_90", "--sample", "1"]
    code, text = report(*arguments, "--json", str(file))
    assert code == 1, text
    rows = {r["kernel"]: r for r in json.loads(file.read_text())["rows"]}
    good = rows["void rows<4>(float const*, float*, int)"]
    assert not good["faults"]
    assert good["binary"]["shared"] == 128 * 4 + 1024  # static, and what the line gives
    cuda_rows = {n: r for n, r in rows.items() if "(" in n or n == "absent"}  # not Triton's
    assert {name: r["faults"] for name, r in cuda_rows.items() if r is not good} == {
        "void rows<1>(float const*, float*, int)": ["0 loads of 16 bytes, expected 1"],
        "lost(int const*, float*)": ["spills 512 bytes, stack 256 bytes"],
        "untold(float*)": ["0 `// static:` lines match, expected one"],
        "absent": ["this `// static:` line matches no kernel"],
    }


def test_with_no_kernel_it_passes_and_an_absent_nvcc_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert static_report._sources(tmp_path) == ([], [])
    assert "no kernel to compile yet" in static_report._verdict([], [], 0, 0.0)
    (tmp_path / "a.cu").touch()
    monkeypatch.setattr(cuda, "nvcc", lambda: None)
    assert static_report._sources(tmp_path)[1] == [
        "1 CUDA sources not compiled: nvcc is not installed"
    ]


@pytest.mark.parametrize(
    ("dtype", "m", "target", "options", "want"),
    [
        (HALF, 16, "sm_80", {}, Expected("HMMA", False, 1)),
        (HALF, 63, "sm_90", {}, Expected("HMMA", False, 1)),
        (HALF, 64, "sm_90", {}, Expected("HGMMA", False, 1)),
        (torch.float16, 128, "sm_100", {}, Expected("UTCHMMA", False, 1)),
        (HALF, 128, "sm_120", {}, Expected("HMMA", False, 1)),  # has neither wgmma nor tcgen05
        (FP32, 64, "sm_90", {}, Expected(None, False, 1)),
        (FP32, 64, "gfx942", {}, Expected("MFMA", False, 1)),
        (HALF, 16, "sm_80", dict(stages=2), Expected("HMMA", True, 1)),
        (HALF, 16, "gfx942", dict(stages=2), Expected("MFMA", False, 1)),
        (HALF, 16, "sm_80", dict(stages=2, aligned=False), Expected("HMMA", False, 0)),
        (FP32, 16, "sm_80", dict(stages=2, aligned=False), Expected(None, True, 0)),
        (HALF, None, "sm_90", {}, Expected(None, False, 0)),
        (HALF, None, "sm_90", dict(streamed=8192), Expected(None, False, 4)),
        (HALF, None, "sm_90", dict(streamed=8193, threads=256), Expected(None, False, 3)),
    ],
)
def test_the_rule(
    dtype: torch.dtype, m: int | None, target: str, options: dict[str, Any], want: Expected
) -> None:
    assert expected(dtype, m, TARGETS[target], **options) == want


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "blocks"),
    [
        ("sm_80", 64, 0, 4, 8),  # 65536 registers
        ("sm_80", 32, 0, 4, 16),  # 64 warps
        ("sm_80", 16, 0, 1, 32),  # slots
        ("sm_80", 32, 163 * 1024, 4, 1),
        ("sm_90", 168, 96 * 1024, 8, 1),
        ("sm_86", 32, 0, 4, 12),  # 48 warps
        ("sm_86", 32, 100 * 1024, 4, 0),
        ("gfx942", 128, 0, 4, 4),
        ("gfx942", 64, 32 * 1024, 4, 2),
    ],
)
def test_blocks_that_fit(target: str, registers: int, shared: int, warps: int, blocks: int) -> None:
    assert blocks_per_sm(TARGETS[target], registers, shared, warps) == blocks


def test_counts_of_instructions() -> None:
    sass = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.U16.CONSTANT R2, desc[UR4][R2.64] ;
        /*0020*/             @!UP0 UTMALDG.2D [UR8], [UR4] ;
        /*0030*/                   LDGSTS.E.BYPASS.LTC128B.128 [R3], [R4.64] ;
        /*0040*/                   STL.64 [R1+0x8], R6 ;
        /*10050*/                  HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*10060*/                  LDGDEPBAR ;
    """
    counts = binary._counts(Counter(binary._INSTRUCTION.findall(sass)))
    assert counts == dict(
        matrix=dict(HGMMA=1),
        asynchronous=dict(UTMALDG=1, LDGSTS=1),
        loads={2: 1, 16: 1},
        spills=8,
    )


def test_a_sample_has_every_kernel_and_moves_with_the_seed() -> None:
    calls = [Listed("m", t, i, k) for t in ("sm_80", "sm_90") for k in "ab" for i in range(20)]
    assert static_report._sample(calls, None, 0) == calls
    samples = [set(static_report._sample(calls, 2, seed)) for seed in range(30)]
    for sample in samples:
        assert Counter((c.kernel, c.target) for c in sample) == dict.fromkeys(
            [(k, t) for k in "ab" for t in ("sm_80", "sm_90")], 2
        )
    assert len(set.union(*samples)) > 70


def test_a_compiler_that_crashes_is_found() -> None:
    work = [(os.getpid, ()), (os._exit, (3,)), (os.getpid, ())]
    with pool.fresh_compiler():
        results = dict(pool.each(work, 1))
    assert results[1] is None
    assert results[0]
    assert results[2]
