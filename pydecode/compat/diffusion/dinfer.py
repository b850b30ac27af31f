"""dInfer's parallel_strategy.py on pydecode: decoders and rules (inclusionAI/dInfer, fce4e32).

Decoders write into ``x[:, block_start:block_end]``, ``x`` a tensor or a TokenArray, from logits
[B, block_end - block_start, V] of any strides but the last. One ``unmask`` a step (for credit two
and an ``earn_credit``), no read of the device, batches of any size under every rule. As ``decode``
has no argument for it, the draws' seed comes from torch's generator, or from ``seed=`` of the
constructor.
"""

from typing import Any

import torch
from torch import Tensor

import pydecode

from .dinfer_rules import (
    NEAR_TIES,
    get_transfer_index_hierarchy_fast_v2,
    get_transfer_index_threshold,
    segments,
)
from .fast_dllm_rules import get_transfer_index, get_transfer_index_dynamic
from .llada import get_num_transfer_tokens
from .transfer import confidence_of, draws

__all__ = [
    "CreditThresholdParallelDecoder",
    "FixedParallelDecoder",
    "HierarchyDecoder",
    "ParallelDecoder",
    "ThresholdParallelDecoder",
    "get_num_transfer_tokens",
    "get_transfer_index",
    "get_transfer_index_dynamic",
    "get_transfer_index_hierarchy_fast_v2",
    "get_transfer_index_threshold",
]


class ParallelDecoder:
    """What the decoders share; replaces the class of that name."""

    def __init__(
        self,
        temperature: float,
        remasking: str = "low_confidence",
        mask_id: int = 126336,
        *,
        seed: int | Tensor | None = None,
    ) -> None:
        self.temperature = temperature
        self.remasking = remasking
        self.mask_id = mask_id
        self.seed = seed
        self._calls = 0

    def block_init(self, block_x: Tensor, block_id: int) -> None:
        """Called before a block's first step."""

    def decode(
        self,
        logits: Tensor,
        block_start: int,
        block_end: int,
        x: Any,
        iter_threshold: float | None = None,
    ) -> None:
        """Fills some masks of x[:, block_start:block_end], in place."""
        raise NotImplementedError

    def _fill(
        self,
        logits: Tensor,
        block_start: int,
        block_end: int,
        x: Any,
        remasking: str = "low_confidence",
        **how: Any,
    ) -> None:
        block = x[:, block_start:block_end]
        x[:, block_start:block_end] = pydecode.unmask(
            block,
            logits,
            mask_id=self.mask_id,
            temperature=self.temperature,
            confidence=confidence_of(remasking),
            **draws(self.temperature, remasking, self.seed, self._calls, block),
            **how,
        ).tokens
        self._calls += 1


class ThresholdParallelDecoder(ParallelDecoder):
    """Fills {c >= min(threshold, c_(1) - 1e-5)}; replaces the class of that name.

    Ours never stalls where the model prefers the mask, see ``get_transfer_index_threshold``.
    ``eos_id`` and ``use_float64`` are kept as attributes, and read by nobody (``eos_id``: nor
    there); ``remasking`` is not read either, as there.
    """

    def __init__(
        self,
        temperature: float,
        threshold: float,
        remasking: str = "low_confidence",
        mask_id: int = 126336,
        eos_id: int = 126081,
        use_float64: bool = False,
        *,
        seed: int | Tensor | None = None,
    ) -> None:
        super().__init__(temperature, remasking, mask_id, seed=seed)
        self.threshold = threshold
        self.eos_id = eos_id
        self.use_float64 = use_float64

    def decode(
        self,
        logits: Tensor,
        block_start: int,
        block_end: int,
        x: Any,
        iter_threshold: float | None = None,
    ) -> None:
        self._fill(logits, block_start, block_end, x, **self._rule(iter_threshold))

    def _rule(self, iter_threshold: float | None) -> dict[str, Any]:
        threshold = self.threshold if iter_threshold is None else iter_threshold
        return dict(rule="threshold", threshold=threshold, slack=NEAR_TIES)


class CreditThresholdParallelDecoder(ThresholdParallelDecoder):
    """As ``ThresholdParallelDecoder``, on logits + credit_alpha * log(1 + credit).

    Replaces the class of that name. A step's most probable token of a masked row earns
    p ** boost_gamma, and all credit decays by decay_beta a step. Theirs holds a dense fp32
    [B, L, V] for every block; ours the few credited ids of each row of one block, which
    ``pydecode.earn_credit`` keeps and ``unmask`` takes as a sparse bias. A request's credit is gone
    once its row of x has no masks left, without reading it (theirs: once no request has any).
    """

    def __init__(
        self,
        credit_alpha: float = 0.7,
        boost_gamma: float = 0.2,
        decay_beta: float = 0.8,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.credit_alpha = credit_alpha
        self.boost_gamma = boost_gamma
        self.decay_beta = decay_beta
        self._credit_of: tuple[Any, ...] = ()

    def decode(
        self,
        logits: Tensor,
        block_start: int,
        block_end: int,
        x: Any,
        iter_threshold: float | None = None,
    ) -> None:
        whole = x if isinstance(x, Tensor) else x.data
        block, mask_id = whole[:, block_start:block_end], self.mask_id
        best, tokens = pydecode.unmask(
            block, logits, mask_id=mask_id, k=0, min_commit=0, return_proposals=True
        )
        of = (block_start, block_end, whole.shape, whole.device)
        if self._credit_of != of:
            self._credit_of = of
            # L slots are enough: a step credits a token a row, and fills at least one row a request
            B, L = block.shape
            self._ids = block.new_full((B, L, L), -1)
            self._credit = torch.zeros((B, L, L), device=whole.device)
            self._masks = torch.zeros(whole.shape, dtype=torch.bool, device=whole.device)
        bias = pydecode.earn_credit(
            self._ids,
            self._credit,
            tokens,
            best.confidence,
            alive=self._masks,
            gamma=self.boost_gamma,
            decay=self.decay_beta,
            alpha=self.credit_alpha,
        )
        pydecode.unmask(
            block,
            logits,
            mask_id=mask_id,
            rule="threshold",
            threshold=self.threshold if iter_threshold is None else iter_threshold,
            slack=NEAR_TIES,
            temperature=self.temperature,
            bias_ids=self._ids,
            bias=bias,
            out=block,
            **draws(self.temperature, "low_confidence", self.seed, self._calls, block),
        )
        self._calls += 1
        torch.eq(whole, mask_id, out=self._masks)  # in place: the next step may be a graph's


class FixedParallelDecoder(ParallelDecoder):
    """Fills a block in ``steps`` steps by LLaDA's schedule; replaces the class of that name.

    Theirs fails in ``block_init`` on undefined names. ``iter_threshold`` is not read, as there.
    """

    def __init__(
        self,
        temperature: float,
        steps: int,
        remasking: str = "low_confidence",
        mask_id: int = 126336,
        *,
        seed: int | Tensor | None = None,
    ) -> None:
        super().__init__(temperature, remasking, mask_id, seed=seed)
        self.steps = steps
        self.iter = 0

    def block_init(self, block_x: Tensor, block_id: int) -> None:
        self.num_transfer_tokens = get_num_transfer_tokens(block_x == self.mask_id, self.steps)
        self.iter = 0

    def decode(
        self,
        logits: Tensor,
        block_start: int,
        block_end: int,
        x: Any,
        iter_threshold: float | None = None,
    ) -> None:
        rule: dict[str, Any] = dict(
            rule="top_k", k=self.num_transfer_tokens[:, self.iter], min_commit=0
        )
        self._fill(logits, block_start, block_end, x, self.remasking, **rule)
        self.iter += 1


class HierarchyDecoder(ParallelDecoder):
    """Fills the surest of each run of masks if c > low_threshold, all c > threshold, and always
    the surest of all; replaces the class of that name, which takes one request at a time.

    Where rows of a run tie, theirs takes all of them, ours the first. ``remasking`` and ``eos_id``
    are not read, as there.
    """

    def __init__(
        self,
        temperature: float,
        remasking: str = "low_confidence",
        mask_id: int = 126336,
        eos_id: int = 126081,
        threshold: float | None = None,
        low_threshold: float | None = 0.4,
        *,
        seed: int | Tensor | None = None,
    ) -> None:
        super().__init__(temperature, remasking, mask_id, seed=seed)
        self.iter = 0
        self.eos_id = eos_id
        self.threshold = threshold
        self.low_threshold = low_threshold

    def block_init(self, block_x: Tensor, block_id: int) -> None:
        self.iter = 0

    def decode(
        self,
        logits: Tensor,
        block_start: int,
        block_end: int,
        x: Any,
        iter_threshold: float | None = None,
    ) -> None:
        threshold = self.threshold if iter_threshold is None else iter_threshold
        rule = segments(threshold, self.low_threshold)
        self._fill(logits, block_start, block_end, x, **rule)
        self.iter += 1
