"""The benchmarks measure what they say: peers compute the same, and noise is told from news."""

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pydecode.bench import block_attention as block
from pydecode.bench import branch_attention as branch
from pydecode.bench import commit_kv, peers, report, run, timing, write_kv
from pydecode.bench import merge_states as merge
from pydecode.bench import ranked_attention as ranked
from pydecode.bench import rejection_sample as reject
from pydecode.bench import sample_and_score as sample
from pydecode.bench import tree_attention as tree
from pydecode.bench import unmask as unmasking
from pydecode.bench import verify_greedy as greedy
from pydecode.bench.roof import Roof
from pydecode.bench.timing import Spread
from pydecode.bench.workload import Workload
from typer.testing import CliRunner

from pydecode.check.run import MUTATED, public
from pydecode.cli import app

CPU = torch.device("cpu")
F32 = torch.float32
TINY = [
    tree.workload(2, 100, 16, F32, heads=(4, 2), D=32),
    block.workload(2, 100, 8, 4, 2, F32),
    ranked.workload("causal", 2, 64, 4, 2, F32),
    ranked.workload("block_causal", 2, 64, 4, 2, F32),
    ranked.workload("bidirectional", 1, 64, 4, 2, F32),
    branch.workload(2, 3, 4, 20, 4, 2, F32),
    commit_kv.workload(2, 3, 2, F32),
    write_kv.workload(2, 5, F32),
    merge.workload(2, 2, 5, 4, 16, F32),
    unmasking.workload(2, 100, F32),
    *(sample.workload(kind, 4, 100, F32) for kind in sample.KINDS),
    reject.workload(1, 3, "token", F32, V=100),
    greedy.workload(2, 16, F32, V=100),
]
# What is no contender but a floor: it sees keys that the tree hides.
FLOORS = {("tree_attention", "SDPA, no mask")}
CALLS = [
    pytest.param(w, peer, id=f"{w.key} | {peer.name}")
    for w in TINY
    for peer in peers.peers()
    if w.op in peer.ops and "compile" not in peer.name and peer.name != "FlexAttention"
]


@pytest.mark.parametrize(("workload", "peer"), CALLS)
def test_peers_compute_the_same_thing(workload: Workload, peer: peers.Peer) -> None:
    if peer.missing:
        pytest.skip(peer.missing)
    args, kwargs = workload.make(CPU)
    before = copy.deepcopy((args, kwargs))
    ours = public(workload.op)(*args, **kwargs)
    if workload.op in MUTATED:  # what it left in the caches is what is held against theirs
        args, kwargs, left = *before, args
    try:
        theirs: Any = peer.ops[workload.op](*args, **kwargs)()
    except peers.Unsupported as reason:
        pytest.skip(str(reason))
    close = dict(rtol=1e-4, atol=1e-5)
    if workload.op in MUTATED:
        for i in MUTATED[workload.op]:
            torch.testing.assert_close(args[i], left[i], **close)
        return
    if workload.op.endswith("attention"):
        same = torch.allclose(theirs.transpose(-3, -2), ours, **close)
        assert same is ((workload.op, peer.name) not in FLOORS)
    elif workload.op == "merge_states":
        torch.testing.assert_close(theirs, tuple(ours), **close)
    elif workload.op == "unmask":
        assert torch.equal(theirs, ours.tokens)
    elif workload.op == "sample_and_score" and "greedy" in workload.label:
        torch.testing.assert_close(theirs, (ours.tokens, ours.confidence), **close)
    elif workload.op == "verify_greedy":
        accepted = theirs.any(1) & theirs.gather(1, ours.path.clamp(min=0).long()).all(1)
        assert accepted.all()  # its nodes that are right hold our path


def test_the_eager_sampler_keeps_its_filters() -> None:
    peer = next(p for p in peers.peers() if p.name == "eager")
    logits = torch.randn(1, 50).expand(4000, 50)
    kwargs = dict(temperature=0.8, top_k=10, top_p=0.7)
    theirs: Any = peer.ops["sample_and_score"](logits, **kwargs)()
    seeds = torch.arange(4000)
    ours = public("sample_and_score")(logits, seed=seeds, **kwargs).tokens
    assert set(theirs[0].tolist()) == set(ours.tolist())


def test_every_workload_is_told_from_the_others() -> None:
    everything = list(run.workloads(run.ops(), quick=False))
    assert len({w.key for w in everything}) == len(everything)
    assert {w.op for w in everything if w.quick} == set(run.ops())
    assert all(w.bytes > 0 for w in everything)


def test_bytes_of_the_design_tables() -> None:
    """CEILINGS 3.1 to 3.4, in MB."""
    by_key = {w.key: w.bytes / 1e6 for w in run.workloads(run.ops(), quick=False)}
    for key, megabytes in {
        "tree_attention B=1 context=2048 nodes=64 heads=32/8 D=128 bfloat16": 9.7,
        "block_attention B=1 context=1024 L=32 heads=32/32 D=128 bfloat16": 17.8,
        "unmask rows=256 V=126464 threshold bfloat16": 64.7,
        "rejection_sample token B=16 G=4 V=128256 bfloat16": 36.9,
    }.items():
        assert by_key[key] == pytest.approx(megabytes, rel=0.01)


def test_a_race_is_interleaved_and_paired() -> None:
    order = []

    def call(name: str, seconds: float) -> timing.Call:
        def run_it(i: int) -> None:
            order.append((name, i))
            time.sleep(seconds)

        return run_it

    contenders = {"a": call("a", 0.002), "b": call("b", 0.006)}
    took = timing.race(contenders, sets=2, device=CPU, rounds=6)
    assert order[4:8] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert len(took.samples["a"]) == 6
    assert took.spread("a").p20 >= 2000
    assert 1.2 < took.ratio("b", "a").median < 4


def test_a_budget_has_something_of_every_op() -> None:
    from pydecode.bench.command import in_turn

    names = [w.op for w in in_turn(run.workloads(run.ops(), quick=False))]
    assert set(names[: len(run.ops())]) == set(run.ops())


def test_spread() -> None:
    spread = Spread.of([float(x) for x in range(1, 102)])
    assert spread == Spread(51.0, 21.0, 81.0)
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)


def rows(monkeypatch: pytest.MonkeyPatch | None = None) -> list[run.Row]:
    top = Roof(1e9, {F32: 1e9})
    here = [p for p in peers.peers() if p.name in ("eager", "FlashInfer")]
    names = ["reference", "cuda"]
    return run.time_workload(TINY[0], names, here, top, CPU, seconds=0.01)[0]


def test_a_row() -> None:
    (row,) = rows()
    assert row.backend == "reference"
    assert row.us.p20 <= row.us.median <= row.us.p80
    assert row.share_of_roof == pytest.approx(
        max(TINY[0].bytes, TINY[0].flops) / 1e3 / row.us.median
    )
    assert row.ratios["eager"].median > 0
    assert row.absent["FlashInfer"] == "flashinfer is not installed"
    assert "no 'cuda' backend" in row.absent["cuda"]


def test_a_peer_that_fails_does_not_end_the_run() -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("boom")

    peer = peers.Peer("broken", "", {"tree_attention": broken})
    top = Roof(1e9, {})
    (row,), absent = run.time_workload(TINY[0], ["reference"], [peer], top, CPU, seconds=0.01)
    assert row.absent == absent == {"broken": "RuntimeError: boom"}


def test_a_backend_that_is_wrong_at_the_timed_shape_is_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    function = public("tree_attention")

    def made_up(*args: Any, backend: str, **kwargs: Any) -> Any:
        return function(*args, backend="reference", **kwargs)

    def check_case(op: str, backend: str, case: Any) -> Any:
        assert case.label == TINY[0].label
        return 3.0, 0, "error 3 times the bound"

    monkeypatch.setattr(run, "public", lambda op: made_up)
    monkeypatch.setattr(run, "check_case", check_case)
    rows, absent = run.time_workload(TINY[0], ["triton"], [], Roof(1e9, {}), CPU, seconds=0.01)
    assert rows == []
    assert "its check fails at" in absent["triton"]


def test_an_op_whose_check_fails_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from pydecode.check import run as checking

    assert run.backends_that_pass(TINY[0], ["reference"], CPU) == {"reference": ""}
    monkeypatch.setattr(checking, "check_case", lambda *_: (9.0, 0, "wrong"))
    verdict = run.backends_that_pass(TINY[0], ["reference"], CPU)["reference"]
    assert "its check fails" in verdict


def saved(path: Path, times: float) -> Path:
    (row,) = rows()
    us = Spread(100 * times, 95 * times, 105 * times)
    report.save(path, [row._replace(us=us)], Roof(1e9, {F32: 1e9}), CPU, [])
    return path


def test_compare(tmp_path: Path) -> None:
    files = [saved(tmp_path / f"{t}.json", t) for t in (1.0, 1.02, 2.0)]
    assert json.loads(files[0].read_text())["machine"]["torch"] == torch.__version__
    for other, verdict in ((files[1], "within the noise"), (files[2], "slower")):
        done = CliRunner().invoke(app, ["bench", "compare", str(files[0]), str(other)])
        assert done.exit_code == 0, done.output
        assert verdict in " ".join(done.output.split())
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    done = CliRunner().invoke(app, ["bench", "compare", str(files[0]), str(bad)])
    assert done.exit_code == 2
    assert "expected a file of" in " ".join(done.output.replace("│", " ").split())


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pydecode.bench import command, roof

    tiny = merge.workload(2, 1, 4, 2, 16, F32)
    monkeypatch.setattr(command.run, "workloads", lambda ops, quick: iter([tiny]))
    monkeypatch.setattr(roof, "measure", lambda device, dtypes: Roof(1e9, {}))
    file, pictures = tmp_path / "run.json", tmp_path / "pictures"
    arguments = ["bench", "--device", "cpu", "--op", "merge_states", "--seconds", "0.01"]
    arguments += ["--json", str(file), "--plots", str(pictures)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert report.load(file)["rows"][0].op == "merge_states"
    assert {p.name for p in pictures.iterdir()} == {"roofline_cache.png", "peers_cache.png"}
    done = CliRunner().invoke(app, ["bench", "--op", "nonsense"])
    assert done.exit_code == 2
    for wrong in (["--device", "tpu"], ["--json", str(tmp_path / "no" / "x.json")]):
        assert CliRunner().invoke(app, [*arguments, *wrong]).exit_code == 2
    done = CliRunner().invoke(app, [*arguments[:5], "--max-gb", "0"])
    assert done.exit_code == 1  # nothing was timed, and it says why
    assert "not timed" in done.output
