"""dInfer's credit without its dense state: the credited ids of each row, and what each has."""

import torch
from torch import Tensor

import pydecode

from .transfer import as_rows, excluded


class Credit:
    """Credit of the rows of one block [B, L], ids and values [B, L, L].

    L slots are enough: a step credits one token a row, and commits at least one row a request.
    Beyond that the slot of least credit is taken. A slot without a token has id -1.
    """

    def __init__(self, block: Tensor) -> None:
        B, L = block.shape
        self.ids = torch.full((B, L, L), -1, dtype=torch.long, device=block.device)
        self.values = torch.zeros((B, L, L), device=block.device)

    def earn(
        self, logits: Tensor, masked: Tensor, mask_id: int, gamma: float, decay: float
    ) -> None:
        """Everything decays, then each masked row's most probable token gets p ** gamma."""
        rows, index = as_rows(logits)
        best = pydecode.sample_and_score(
            rows, row_index=torch.where(masked, index, -1), exclude_ids=excluded(mask_id, logits)
        )
        token = best.tokens[..., None]  # -1 in rows that are not masked
        earned = best.confidence.to(self.values.dtype)[..., None] ** gamma
        same = self.ids == token
        known = same.any(-1, keepdim=True)
        least = self.values.argmin(-1, keepdim=True)
        slot = torch.where(known, same.to(torch.uint8).argmax(-1, keepdim=True), least)
        before = self.values.mul_(decay).gather(-1, slot)
        after = torch.where(known, before, 0.0) + earned
        self.values.scatter_(-1, slot, torch.where(token >= 0, after, before))
        self.ids.scatter_(-1, slot, torch.where(token >= 0, token, self.ids.gather(-1, slot)))

    def bias(self, alpha: float) -> Tensor:
        """What the credit adds to logits, [B, L, L]."""
        return alpha * (self.values + 1).log()

    def keep_if(self, some: Tensor) -> None:
        """All credit is gone unless ``some`` (0-d bool) holds."""
        self.values.mul_(some)
