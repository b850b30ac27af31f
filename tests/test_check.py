"""``pydecode check`` finds what a backend gets wrong: each fault of a made-up one is noticed."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from pydecode.check import run
from pydecode.check.compare import same_bits, share_of_bound
from pydecode.check.draw import Draw
from pydecode.schemas import SCHEMAS

Fault = Callable[..., Any]


def outcome(
    monkeypatch: pytest.MonkeyPatch,
    op: str,
    fault: Fault,
    dtype: torch.dtype = torch.float32,
    cases: int = 12,
) -> run.Outcome:
    """Checks a backend "made up" of an op: ``fault(the public function, args, kwargs)``."""
    original = run.public(op)

    def made_up(*args: Any, backend: str, **kwargs: Any) -> Any:
        if backend == "made up":
            return fault(original, args, kwargs)
        return original(*args, backend=backend, **kwargs)

    monkeypatch.setattr(run, "public", lambda _: made_up)
    return run.check(op, "made up", dtype, "cpu", seed=5, cases=cases)


def right(function: Any, args: Any, kwargs: Any) -> Any:
    return function(*args, **kwargs)


@pytest.mark.parametrize("op", SCHEMAS)
def test_the_reference_passes(op: str) -> None:
    for dtype in run.dtypes(op):
        done = run.check(op, "reference", dtype, "cpu", seed=torch.initial_seed() % 2**31, cases=4)
        assert done.ok, done.failures
        assert done.cases == 4


def test_what_a_machine_lacks_is_skipped() -> None:
    done = run.check("tree_attention", "cuda", torch.float32, "cpu", seed=1, cases=3)
    assert done.ok
    assert done.cases == 0
    assert "no 'cuda' backend" in done.skipped


def test_a_right_backend_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome(monkeypatch, "tree_attention", right).ok


def noisy(share: float) -> Fault:
    def fault(function: Any, args: Any, kwargs: Any) -> Any:
        out, lse = function(*args, **kwargs)
        return out.mul_(1 + share * torch.linspace(-1, 1, out.shape[-1])), lse

    return fault


def off_one_page(function: Any, args: Any, kwargs: Any) -> Any:
    """Reads one cached row too many: a NaN slot, or the row of someone else."""
    return function(*args, **dict(kwargs, cache_seqlens=kwargs["cache_seqlens"] + 1))


def no_sinks(function: Any, args: Any, kwargs: Any) -> Any:
    return function(*args, **dict(kwargs, sinks=None, softcap=0.0, window_size=None))


def ignores_out(function: Any, args: Any, kwargs: Any) -> Any:
    kwargs.pop("out", None)
    return function(*args, **kwargs)


def leaves_a_hole_in_out(function: Any, args: Any, kwargs: Any) -> Any:
    out = kwargs.pop("out", None)
    results = function(*args, **kwargs)
    if out is None:
        return results
    out[:, 1:] = results[0][:, 1:]
    return out, results[1]


def writes_past_out(function: Any, args: Any, kwargs: Any) -> Any:
    results = function(*args, **kwargs)
    if "out" in kwargs:
        guards = kwargs["out"]._pydecode_guards
        guards[guards.numel() - run.GUARD] = 1.0
    return results


def changes_an_input(function: Any, args: Any, kwargs: Any) -> Any:
    results = function(*args, **kwargs)
    args[0].zero_()
    return results


@pytest.mark.parametrize(
    "fault",
    [
        noisy(1e-4),
        off_one_page,
        no_sinks,
        ignores_out,
        leaves_a_hole_in_out,
        writes_past_out,
        changes_an_input,
    ],
)
def test_faults_of_attention(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    assert not outcome(monkeypatch, "tree_attention", fault).ok


def last_key_lost(function: Any, args: Any, kwargs: Any) -> Any:
    return function(*args, **dict(kwargs, cache_seqlens=(kwargs["cache_seqlens"] - 1).clamp(min=0)))


def whole_last_tile_lost(function: Any, args: Any, kwargs: Any) -> Any:
    n = kwargs["cache_seqlens"]
    return function(*args, **dict(kwargs, cache_seqlens=n - 64 * ((n > 0) & (n % 64 == 0))))


def wrong_row_64(function: Any, args: Any, kwargs: Any) -> Any:
    out, lse = function(*args, **kwargs)
    if out.dim() == 4 and out.shape[1] > 64:
        out[:, 64] = out[:, 0].clone()
    return out, lse


def wrong_in_groups_of_seven(function: Any, args: Any, kwargs: Any) -> Any:
    out, lse = function(*args, **kwargs)
    if args[0].shape[-2] == 7 * args[1].shape[-2]:
        out.copy_(out.flip(-2))
    return out, lse


def other_in_a_batch(function: Any, args: Any, kwargs: Any) -> Any:
    fault = noisy(2e-3) if args[0].dim() == 4 and args[0].shape[0] > 1 else right
    return fault(function, args, kwargs)


@pytest.mark.parametrize(
    "fault",
    [last_key_lost, whole_last_tile_lost, wrong_row_64, wrong_in_groups_of_seven, other_in_a_batch],
)
def test_faults_of_16_bit_kernels(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    done = outcome(monkeypatch, "tree_attention", fault, torch.bfloat16, cases=24)
    assert not done.ok
    assert fault is not other_in_a_batch or "other bits alone" in done.failures[0]


@pytest.mark.parametrize(
    ("op", "name"),
    [
        *(("rejection_sample", name) for name in ("allowed", "uniforms", "draft_temperature")),
        *(("rejection_sample_tree", name) for name in ("allowed", "uniforms")),
        *(("sample_and_score", name) for name in ("allowed", "filter_order", "positions")),
        *(("unmask", name) for name in ("allowed", "bias_ids")),
        *(("verify_greedy", name) for name in ("allowed", "num_drafts", "first_match")),
        *(("earn_credit", name) for name in ("alive", "gamma", "decay")),
        ("ranked_attention", "num_tokens"),
        ("tree_attention", "positions"),
        ("block_attention", "cache_starts"),
    ],
)
def test_an_argument_that_is_not_read(monkeypatch: pytest.MonkeyPatch, op: str, name: str) -> None:
    def fault(function: Any, args: Any, kwargs: Any) -> Any:
        gone = {name, "bias"} if name == "bias_ids" else {name}
        return function(*args, **{k: v for k, v in kwargs.items() if k not in gone})

    assert not outcome(monkeypatch, op, fault, cases=72).ok  # three dtypes of a user's run


@pytest.mark.parametrize("op", ["rejection_sample", "rejection_sample_tree", "verify_greedy"])
def test_a_missing_row_that_is_read(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    def fault(function: Any, args: Any, kwargs: Any) -> Any:
        if "row_index" in kwargs:
            kwargs = dict(kwargs, row_index=kwargs["row_index"].clamp(min=0))
        return function(*args, **kwargs)

    assert not outcome(monkeypatch, op, fault, cases=72).ok


def test_a_16_bit_backend_may_err_as_the_plain_formula_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert outcome(monkeypatch, "tree_attention", noisy(1e-4), torch.bfloat16).ok
    assert not outcome(monkeypatch, "tree_attention", noisy(0.05), torch.bfloat16).ok


def never_accepts_the_last(function: Any, args: Any, kwargs: Any) -> Any:
    count = kwargs.get("num_drafts")
    G = args[1].shape[1]
    return function(*args, **dict(kwargs, num_drafts=max(G - 1, 0) if count is None else count))


def other_seed(function: Any, args: Any, kwargs: Any) -> Any:
    return function(*args, **dict(kwargs, seed=12345))


@pytest.mark.parametrize("fault", [never_accepts_the_last, other_seed])
def test_faults_of_verification(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    done = outcome(monkeypatch, "rejection_sample", fault)
    assert "no rounding error explains" in done.failures[0]


def test_a_decision_within_rounding_is_forgiven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two logits that differ by less than any kernel can tell: either may be the argmax."""
    logits = torch.zeros(1, 1, 9, dtype=torch.float32)
    logits[..., 4] = 1.0
    logits[..., 6] = 1.0 + 2**-23
    case = run.Case((logits,), {}, "")

    def made_up(*args: Any, backend: str) -> Any:
        result = run.pydecode.sample_and_score(*args)
        if backend == "made up":
            return result._replace(tokens=torch.full_like(result.tokens, token))
        return result

    monkeypatch.setattr(run, "public", lambda _: made_up)
    for token, forgiven in ((6, True), (4, True), (5, False)):
        _, margin, wrong = run.check_case("sample_and_score", "made up", case)
        assert (wrong == "") is forgiven
        assert margin == (token == 4)


def writes_a_neighbour(function: Any, args: Any, kwargs: Any) -> Any:
    result = function(*args, **kwargs)
    cache = args[2] if isinstance(args[2], Tensor) and args[2].dim() == 4 else args[0][0]
    cache[0, 0] = cache[0, 0] * 1 + 1
    return result


def other_pages(function: Any, args: Any, kwargs: Any) -> Any:
    return function(*args, **dict(kwargs, block_table=kwargs["block_table"].flip(1)))


@pytest.mark.parametrize("op", ["write_kv", "commit_kv"])
def test_faults_of_the_cache(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    assert not outcome(monkeypatch, op, writes_a_neighbour).ok
    assert not outcome(monkeypatch, op, other_pages).ok


def test_a_seed_repeats_its_cases() -> None:
    for op in SCHEMAS:
        first, again, other = (
            run.maker(op)(Draw(seed, torch.float32, "cpu")).label for seed in (1, 1, 2)
        )
        assert first == again
    assert first != other


def test_bounds() -> None:
    want = torch.linspace(1, 2, 100, dtype=torch.float64)
    plain = want + 1e-3
    assert share_of_bound(want + 1.9e-3, want, plain, torch.float32).worst < 1
    assert share_of_bound(want + 2.1e-3, want, plain, torch.float32).worst > 1
    spike = want.clone()
    spike[7] += 2.1e-3  # one large error among none
    assert share_of_bound(spike, want, plain, torch.float32).largest > 1
    assert share_of_bound(spike, want, plain, torch.float32).rms < 1
    nan = want.clone()
    nan[0] = torch.nan
    assert share_of_bound(nan, want, plain, torch.float32).worst == torch.inf
    assert share_of_bound(nan, nan, plain, torch.float32).worst == 0
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.zeros(1), -torch.zeros(1))


def test_command_line(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pydecode.cli import app

    file = tmp_path / "check.json"
    arguments = ["check", "--op", "merge_states", "--dtype", "float32", "--device", "cpu"]
    done = CliRunner().invoke(app, [*arguments, "--seed", "3", "--json", str(file)])
    assert done.exit_code == 0, done.output
    assert "seed 3: ok" in done.output
    result = json.loads(file.read_text())
    assert result["seed"] == 3
    assert result["machines"][0]["torch"] == torch.__version__
    assert result["outcomes"][0]["ok"]
    monkeypatch.setattr(run, "check_case", lambda *_: (2.0, 0, "made-up failure [B, N]"))
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert "FAILED" in done.output
    done = CliRunner().invoke(app, [*arguments, "--backend", "cuda"])
    assert done.exit_code == 1
    done = CliRunner().invoke(app, ["check", "--op", "merge_states", "--budget", "0"])
    assert done.exit_code == 1
    assert "left out, over the budget" in done.output
    for wrong in (["--json", str(tmp_path / "no" / "x.json")], ["--device", "cuda:99"]):
        done = CliRunner().invoke(app, [*arguments, *wrong])
        assert done.exit_code == 2  # before anything ran
    done = CliRunner().invoke(app, ["check", "--op", "commit", "--dtype", "float16"])
    assert "commit has float32" in " ".join(done.output.replace("│", " ").split())
    done = CliRunner().invoke(app, ["check", "--op", "tree_atention"])
    assert done.exit_code == 2
    assert "tree_atention" in done.output
