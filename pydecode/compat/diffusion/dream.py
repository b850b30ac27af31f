"""Dream's generation_utils.py on pydecode (DreamLM/Dream fac0a7f, NVlabs/Fast-dLLM 24cc59e)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pydecode
from pydecode import philox
from pydecode.sampling_arguments import batch_of

from .transfer import as_rows, excluded, new_seed

# alg -> the op's confidence; "origin" commits by coin, which reads none
ALGORITHMS = {
    "origin": "probability",
    "maskgit_plus": "probability",
    "topk_margin": "margin",
    "entropy": "neg_entropy",
}
DEFAULTS: dict[str, Any] = dict(
    temperature=0.0,
    top_p=None,
    top_k=None,
    max_length=20,
    max_new_tokens=None,
    eps=1e-3,
    steps=512,
    alg="origin",
    alg_temp=None,
    num_return_sequences=1,
    return_dict_in_generate=False,
    output_history=False,
    mask_token_id=None,
)


@dataclass
class DreamModelOutput:
    """What ``diffusion_generate`` returns with ``return_dict_in_generate=True``."""

    sequences: Tensor
    history: list[Tensor] | None = None


def sample_tokens(
    logits: Tensor,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    margin_confidence: bool = False,
    neg_entropy: bool = False,
    *,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
) -> tuple[Tensor, Tensor]:
    """Dream's sampler: a token of every row, and how sure it is under the law that it is from.

    Replaces ``sample_tokens`` (division, sort, cumsum, scatter, top-k, softmax, Categorical; a full
    sort for the margin).

    logits [..., V] -> (confidence in logits' dtype [...], x0 int64 [...]): the token's probability,
    p_(1) - p_(2), or sum p log p (without theirs' 1e-10), under temperature and filters; at
    temperature 0, where the token is the argmax, under the filters alone. Top-p and top-k both act
    on the whole law. ``margin_confidence`` takes any number of dimensions, theirs [n, V] only; a
    top_k of 0 is off, an IndexError there. ``seed`` is an int, or [B] of [B, V] or [B, L, V].
    """
    confidence = "neg_entropy" if neg_entropy else "margin" if margin_confidence else "probability"
    if seed is None:
        seed = 0 if temperature == 0 else new_seed(batch_of(logits.shape[:-1]), logits.device)
    scores = pydecode.sample_and_score(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        filter_order="joint",
        confidence=confidence,
        tempered=True,
        seed=seed,
        offset=offset,
    )
    return scores.confidence.to(logits.dtype), scores.tokens


@torch.no_grad()
def diffusion_generate(
    model: Callable[..., Any],
    inputs: Tensor,
    generation_config: Any = None,
    *,
    attention_mask: Tensor | None = None,
    generation_tokens_hook_func: Callable[[int | None, Tensor, Tensor | None], Tensor]
    | None = None,
    generation_logits_hook_func: Callable[[int, Tensor, Tensor], Tensor] | None = None,
    seed: int | Tensor | None = None,
    **settings: Any,
) -> Tensor | DreamModelOutput:
    """Dream's generator: ``steps`` forwards, one ``unmask`` each, no host read in the loop.

    ``diffusion_generate(model, inputs, ..)`` replaces ``model.diffusion_generate(inputs, ..)``. The
    model is called as ``_sample`` does, ``model(x, attention_mask, tok_idx).logits``, with "full"
    and None where nothing is padded. Position i's token is read from row i - 1; theirs copies all
    logits for that, then the masked rows.

    Args:
        inputs: [B, P] int64. attention_mask: [B, P], 0 at padding (read once, as theirs).
        settings: temperature, top_p, top_k, max_length, max_new_tokens, eps, steps, alg
            ("origin", "maskgit_plus", "topk_margin", "entropy"), alg_temp, num_return_sequences,
            return_dict_in_generate, output_history, mask_token_id; else from ``generation_config``
            or, without one, ``model.config``; mask_token_id also from ``model.generation_config``.
        generation_tokens_hook_func, generation_logits_hook_func: as there, (step, x, logits); they
            see shifted logits, so **with either the shifted copy is made**.
        seed: int or [B * num_return_sequences]; None: from torch's generator.

    Returns:
        [B, length] int64, or ``DreamModelOutput(sequences, history)``.

    In a batch of unequal numbers of masks theirs commits the mean number everywhere, and turns
    committed tokens back into masks where it exceeds a request's; ours takes each request's own.
    With ``alg_temp`` positions are drawn without replacement by softmax(confidence / alg_temp),
    with Gumbel noise.

    Raises:
        TypeError: an unknown setting. ValueError: an unknown alg (Fast-dLLM's
            "confidence_threshold": use ``pydecode.decode.diffusion``), no mask_token_id, no room.
    """
    unknown = settings.keys() - DEFAULTS.keys()
    if unknown:
        raise TypeError(f"{', '.join(sorted(unknown))}: not a setting of diffusion_generate")
    given = _settings(model, generation_config, settings)
    alg, steps, mask_id = given["alg"], given["steps"], given["mask_token_id"]
    if alg not in ALGORITHMS:
        raise ValueError(f"alg: expected one of {sorted(ALGORITHMS)}, got {alg!r}")
    if mask_id is None:
        raise ValueError("mask_token_id: expected an id, in settings or the model's config")
    mask_id = int(mask_id)

    copies = given["num_return_sequences"]
    if copies != 1:
        inputs = inputs.repeat_interleave(copies, dim=0)
        if attention_mask is not None:
            attention_mask = attention_mask.repeat_interleave(copies, dim=0)
    B, P = inputs.shape
    length = _length(P, given, settings)
    x = torch.cat([inputs, inputs.new_full((B, length - P), mask_id)], dim=1)
    mask, tok_idx = _padding(attention_mask, length)
    drawn = given["temperature"] > 0 or alg == "origin" or given["alg_temp"]
    if seed is None:
        seed = new_seed(B, x.device) if drawn else 0

    tokens_hook, logits_hook = generation_tokens_hook_func, generation_logits_hook_func
    scoring: dict[str, Any] = dict(
        temperature=given["temperature"],
        top_k=given["top_k"],
        top_p=given["top_p"],
        filter_order="joint",
        confidence=ALGORITHMS[alg],
        tempered=True,
        seed=seed,
    )
    times = torch.linspace(1, given["eps"], steps + 1)
    kept = (times[1:] / times[:-1]).tolist()  # s / t, on the host
    history: list[Tensor] | None = (
        [] if given["return_dict_in_generate"] and given["output_history"] else None
    )
    if tokens_hook is not None:
        x = tokens_hook(None, x, None)
    for i in range(steps):
        last = i == steps - 1
        logits, shift = model(x, mask, tok_idx).logits, 1
        if tokens_hook is not None or logits_hook is not None:
            logits, shift = torch.cat([logits[:, :1], logits[:, :-1]], dim=1), 0
            if logits_hook is not None:
                logits = logits_hook(i, x, logits)
        scoring["offset"] = i
        if alg == "origin":
            rule: dict[str, Any] = dict(rule="posterior", keep=0.0 if last else kept[i])
        else:
            masks = (x == mask_id).sum(-1)
            k = masks if last else (masks * (1 - kept[i])).long()
            rule = dict(rule="top_k", k=k, min_commit=0)
        if alg != "origin" and given["alg_temp"]:
            x = _unmask_drawn(x, logits, mask_id, shift, given["alg_temp"], rule, scoring)
        else:
            x = pydecode.unmask(x, logits, mask_id=mask_id, shift=shift, **rule, **scoring).tokens
        if tokens_hook is not None:
            x = tokens_hook(i, x, logits)
        if history is not None:
            history.append(x.clone())
    return DreamModelOutput(x, history) if given["return_dict_in_generate"] else x


def _settings(model: Any, generation_config: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """What was given, else the generation config, else (as theirs) the model's own config.

    Only the mask token is looked for further: a model's stock generation config holds a top_k or
    a temperature that nobody asked for.
    """
    own = getattr(model, "generation_config", None), getattr(model, "config", None)
    given = own[1] if generation_config is None else generation_config
    mask = ("mask_token_id",)
    found = dict(DEFAULTS)
    for place, names in ((own[1], mask), (own[0], mask), (given, tuple(DEFAULTS))):
        found |= {n: v for n in names if (v := getattr(place, n, None)) is not None}
    return found | settings


def _length(P: int, given: dict[str, Any], settings: dict[str, Any]) -> int:
    """Of prompt and answer together."""
    if given["max_new_tokens"] is not None:
        return P + int(given["max_new_tokens"])
    length = int(given["max_length"])
    if settings.get("max_length") is None and length == DEFAULTS["max_length"]:
        return P + length  # nobody has said: that many new ones, as theirs
    if length <= P:
        raise ValueError(f"max_length: expected more than the prompt's {P}, got {length}")
    return length


def _padding(attention_mask: Tensor | None, length: int) -> tuple[Tensor | str, Tensor | None]:
    """What the model gets as attention_mask and tok_idx: a pairwise mask, positions by cumsum."""
    if attention_mask is None or not bool((attention_mask == 0).any()):
        return "full", None
    ones = attention_mask.new_ones(attention_mask.shape[0], length - attention_mask.shape[1])
    valid = torch.cat([attention_mask, ones], dim=1)
    tok_idx = (valid.long().cumsum(-1) - 1).masked_fill(valid == 0, 1)
    valid = valid.bool()
    return valid[:, None, None, :] & valid[:, None, :, None], tok_idx


def _unmask_drawn(
    x: Tensor,
    logits: Tensor,
    mask_id: int,
    shift: int,
    alg_temp: float,
    rule: dict[str, Any],
    scoring: dict[str, Any],
) -> Tensor:
    """k positions without replacement by softmax(c / alg_temp): the k largest c / alg_temp + g."""
    rows, index = as_rows(logits)
    if shift:
        index = torch.cat([index[:, :1], index[:, :-1]], dim=1)
    scores = pydecode.sample_and_score(
        rows,
        row_index=torch.where(x == mask_id, index, -1),
        exclude_ids=excluded(mask_id, logits),
        **scoring,
    )
    seed, B = scoring["seed"], x.shape[0]
    tensor = seed if isinstance(seed, Tensor) else None
    keys = philox.request_keys(0 if tensor is not None else seed, tensor, B, x.device)
    noise = philox.gumbel(
        philox.COMMIT,
        keys[:, None],
        torch.full_like(keys[:1], scoring["offset"]),
        torch.arange(x.shape[1], device=x.device),
        1,
    )[..., 0]
    ranked = scores.confidence / alg_temp + noise
    return pydecode.commit(x, scores.tokens, ranked, mask_id=mask_id, **rule).tokens
