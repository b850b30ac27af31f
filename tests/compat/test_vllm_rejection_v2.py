"""pydecode.compat.vllm.v2 against the documented semantics of vLLM's model runner V2."""

import inspect
from typing import Any

import peer_vllm as peer
import pytest
import torch
from vllm_batches import V, chain_law, logits_like, spy_on

import pydecode
from pydecode.compat.vllm import v2


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return spy_on(monkeypatch)


def v2_batch(B: int, K: int, *, layout: str = "plain", Vd: int = V) -> dict[str, Any]:
    """A batch scattered over 2 B places; target logits are already over the temperature."""
    counts = torch.randint(0, K + 1, (B,))
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), (counts + 1).cumsum(0)]).int()
    N, R = int(cu[-1]), 2 * B
    shape = dict(plain=(R, K, Vd), steps_first=(K, R, Vd), wide=(R, K + 2, Vd + 3))[layout]
    draft_logits = torch.randn(shape, dtype=torch.float64)
    if layout == "steps_first":
        draft_logits = draft_logits.transpose(0, 1)
    if layout == "wide":
        draft_logits = draft_logits[:, :K, :Vd]
    temperature = torch.tensor([0.0, 0.5, 1.0, 2.0])[torch.randint(0, 4, (R,))]
    mapping = torch.randperm(R)[:B]
    request = torch.repeat_interleave(torch.arange(B), counts + 1)
    step = torch.arange(N) - cu.long()[request]
    return dict(
        target_logits=logits_like(N),
        draft_logits=draft_logits,
        draft_sampled=torch.where(torch.rand(N) < 0.1, -1, torch.randint(0, V, (N,))),
        cu_num_logits=cu,
        pos=torch.randint(0, 1000, (B,))[request] + step,
        idx_mapping=mapping.int(),
        expanded_idx_mapping=mapping[request].int(),
        expanded_local_pos=step.int(),
        temperature=temperature,
        seed=torch.randint(0, 2**40, (R,)),
        num_speculative_steps=K,
    )


@pytest.mark.parametrize("block", [False, True], ids=["token", "block"])
@pytest.mark.parametrize("layout", ["plain", "steps_first", "wide", "none"])
def test_v2_random_batches(spy: dict[str, Any], layout: str, block: bool) -> None:
    B, K = 800, 4
    call = v2_batch(B, K, layout="plain" if layout == "none" else layout)
    if layout == "none":
        call["draft_logits"] = None
    u = torch.rand(B, K + 1, dtype=torch.float64)
    spy["set"] = dict(uniforms=u)
    sampled, num = v2.rejection_sample(**call, use_block_verification=block)
    assert (sampled.dtype, num.dtype) == (torch.int64, torch.int32)
    assert sampled.shape == (B, K + 1)
    # without draft laws the two rules accept with the same probabilities, and ours draws as "token"
    law = peer.block_chain if block and layout != "none" else peer.token_chain
    for b in range(B):
        first, end = call["cu_num_logits"][b : b + 2].tolist()
        z, x = call["target_logits"][first:end].tolist(), call["draft_sampled"][first + 1 : end]
        place = int(call["idx_mapping"][b])
        T = float(call["temperature"][place])
        p, n = [peer.softmax(row) for row in z], end - first - 1
        q = None
        if T == 0:
            want, whole = peer.greedy_chain(z, x.tolist())
            last = z[n].index(max(z[n]))
        else:
            if call["draft_logits"] is not None:
                q = [peer.softmax((call["draft_logits"][place, i] / T).tolist()) for i in range(n)]
            want, whole = law(p, q, x.tolist(), [*u[b, :n].tolist(), u[b, K].item()])
            last = peer.pick(p[n], u[b, K].item())
        want += [last] if whole else []
        assert sampled[b].tolist() == want + [-1] * (K + 1 - len(want)), b
        assert num[b] == len(want)


def test_v2_keys_are_the_request_s_own(spy: dict[str, Any]) -> None:
    call = v2_batch(50, 3)
    sampled, _ = v2.rejection_sample(**call)
    first = call["cu_num_logits"][:-1].long()
    assert torch.equal(spy["positions"], call["pos"][first] + 1)  # slot 0 is a token of the text
    assert torch.equal(spy["seed"], call["seed"][call["idx_mapping"].long()])
    for b in (0, 17, 49):  # alone, and at another place
        rows = slice(*call["cu_num_logits"][b : b + 2].tolist())
        place = call["idx_mapping"][b : b + 1].long()
        alone = dict(
            call,
            idx_mapping=torch.tensor([1]),
            cu_num_logits=torch.tensor([0, rows.stop - rows.start]),
        )
        for name in ("target_logits", "draft_sampled", "pos"):
            alone[name] = call[name][rows]
        for name in ("draft_logits", "temperature", "seed"):
            alone[name] = call[name][place].repeat(2, *[1] * (call[name].dim() - 1))
        assert torch.equal(v2.rejection_sample(**alone)[0][0], sampled[b])


def test_v2_no_copy_of_the_draft_logits(spy: dict[str, Any]) -> None:
    for layout in ("plain", "steps_first", "wide"):
        call = v2_batch(4, 3, layout=layout)
        v2.rejection_sample(**call)
        assert spy["args"][2].data_ptr() == call["draft_logits"].data_ptr()
        assert spy["args"][0].data_ptr() == call["target_logits"].data_ptr()


def test_v2_the_smaller_vocabulary_counts(spy: dict[str, Any]) -> None:
    """A padded target, or a padded drafter: what is above is not even seen."""
    for pad_target in (True, False):
        call = v2_batch(60, 3)
        spy["set"] = dict(uniforms=torch.rand(60, 4, dtype=torch.float64))
        want = v2.rejection_sample(**call)
        name = "target_logits" if pad_target else "draft_logits"
        padded = torch.nn.functional.pad(call[name], (0, 5), value=torch.inf)
        got = v2.rejection_sample(**{**call, name: padded})
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("tempered", [False, True])
def test_v2_law_at_a_temperature(tempered: bool) -> None:
    """Drafts from softmax(logits / T): said to be tempered already, the law is another."""
    torch.manual_seed(5)
    B, T = 30_000, 0.4
    z, y = torch.rand(2, V).double(), 2 * torch.rand(V).double()
    drafts = torch.multinomial((y / T).softmax(-1), B, replacement=True)
    sampled, num = v2.rejection_sample(
        (z / T).repeat(B, 1),
        y.expand(B, 1, V),
        torch.stack([torch.zeros(B).long(), drafts], 1).flatten(),
        torch.arange(0, 2 * B + 1, 2),
        torch.tensor([9, 10]).repeat(B),
        torch.arange(B),
        *(torch.arange(2 * B) // 2, torch.arange(2 * B) % 2),
        torch.full((B,), T),
        torch.arange(B),
        1,
        draft_logits_tempered=tempered,
    )
    p = (z / T).softmax(-1)
    second = torch.where(num == 2, sampled[:, 1], torch.multinomial(p[1], B, replacement=True))
    assert (chain_law(p, torch.stack([sampled[:, 0], second], 1)) > 0.04) == tempered


def test_v2_edges() -> None:
    call = v2_batch(6, 3)
    call["target_logits"][call["cu_num_logits"][2].long()] = torch.nan
    sampled, num = v2.rejection_sample(**call, use_fp64=True)
    assert sampled[2].tolist() == [-1] * 4
    assert num.tolist()[2] == 0
    assert (num[[0, 1, 3, 4, 5]] > 0).all()
    with pytest.raises(NotImplementedError, match="synthetic_conditional_rates"):
        v2.rejection_sample(**call, synthetic_conditional_rates=torch.ones(3))
    with pytest.raises(ValueError, match="draft_logits: expected 3 dimensions"):
        v2.rejection_sample(**call | dict(draft_logits=call["draft_logits"][0]))
    empty = {
        n: x[:0]
        for n, x in call.items()
        if n not in ("temperature", "seed") and hasattr(x, "shape")
    }
    empty |= dict(cu_num_logits=torch.zeros(1).int(), draft_logits=call["draft_logits"])
    sampled, num = v2.rejection_sample(**{**call, **empty})
    assert (sampled.shape, num.shape) == ((0, 4), (0,))


def test_checks_pass_on_a_good_call() -> None:
    call = v2_batch(20, 3)
    call["draft_sampled"].clamp_(min=0)
    with pydecode.checks(True):
        v2.rejection_sample(**call)


def test_signature() -> None:
    names = list(inspect.signature(v2.rejection_sample).parameters)
    assert names[:11] == [*v2_batch(1, 1)]
    assert names[11:14] == ["synthetic_conditional_rates", "use_fp64", "use_block_verification"]
