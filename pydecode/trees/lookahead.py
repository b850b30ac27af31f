"""Lookahead decoding's window: its mask, which is not a tree's, and its positions.

Lookahead decoding (Fu et al., ICML 2024, sections 3 and 4). With W = window, n the n-gram size and
G = guesses, the N = (W + G) * (n - 1) rows in flight are, in this order:

    level 0       W rows: the input token (the last committed one), then W - 1 tokens
    level 1..n-2  W rows each
    guesses       G rows of n - 1 tokens each
    row(level, c) = level * W + c,   row(guess, j) = (n - 1) * W + guess * (n - 1) + j
"""

import torch
from torch import Tensor

from .masks import pack_mask
from .tree import expect_int


def lookahead_mask(
    window: int, n: int, guesses: int, *, device: torch.device | str | None = None
) -> Tensor:
    """The packed mask of lookahead decoding's window and guesses.

    Row (level, c) sees the columns <= c of level 0, and column c of the levels 1..level. Guess
    (g, j) sees the input token and the tokens 0..j of its own guess. The window sees no guess.

    Args:
        window: W >= 1, columns of the window, the input token's included.
        n: the n-gram size, >= 2: n - 1 levels, and n - 1 tokens a guess.
        guesses: G >= 0, candidates that are verified in the same forward.

    Returns:
        packed int64 [1, N, ceil(N/64)] with N = (W + G) * (n - 1); the rows' order is the module's:
        level 0, levels 1..n-2, guesses.

    Raises:
        ValueError: a size that is not an int or too small.

    >>> import pydecode
    >>> packed = pydecode.trees.lookahead_mask(2, 3, 1)  # two levels of two columns, one guess of 2
    >>> pydecode.trees.unpack_mask(packed, 6)[0].int()
    tensor([[1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 0, 1, 0, 0, 0],
            [1, 1, 0, 1, 0, 0],
            [1, 0, 0, 0, 1, 0],
            [1, 0, 0, 0, 1, 1]], dtype=torch.int32)
    """
    level, column, guess = _rows(window, n, guesses)
    see_level, see_column, see_guess = level[:, None], column[:, None], guess[:, None]
    in_window = (see_guess < 0) & (guess < 0)
    causal = (level == 0) & (column <= see_column)
    diagonal = (level > 0) & (level <= see_level) & (column == see_column)
    in_guess = (see_guess >= 0) & (see_guess == guess) & (column <= see_column)
    input_token = torch.arange(len(level)) == 0  # seen by all
    mask = (in_window & (causal | diagonal)) | in_guess | input_token
    return pack_mask(mask[None]).to(device)


def lookahead_positions(
    window: int, n: int, guesses: int, *, device: torch.device | str | None = None
) -> Tensor:
    """Positions of the window's rows, counted from the input token's.

    level + c for row (level, c) of the window, 1 + j for token j of a guess.

    Args:
        window, n, guesses: as ``lookahead_mask``.

    Returns:
        int64 [1, N]; rotary positions are ``cache_seqlens[:, None] + lookahead_positions(...)``.

    Raises:
        ValueError: a size that is not an int or too small.

    >>> import pydecode
    >>> pydecode.trees.lookahead_positions(2, 3, 1)
    tensor([[0, 1, 1, 2, 1, 2]])
    """
    level, column, guess = _rows(window, n, guesses)
    return torch.where(guess < 0, level + column, 1 + column)[None].to(device)


def _rows(window: int, n: int, guesses: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's level, column (a guess's: the token's index) and guess (-1: the window)."""
    W, size = expect_int("window", window, 1), expect_int("n", n, 2) - 1
    guesses = expect_int("guesses", guesses, 0)
    columns = [torch.arange(W).repeat(size), torch.arange(size).repeat(guesses)]
    levels = [torch.arange(size).repeat_interleave(W), torch.zeros(guesses * size).long()]
    owners = [torch.full((size * W,), -1), torch.arange(guesses).repeat_interleave(size)]
    return torch.cat(levels), torch.cat(columns), torch.cat(owners)
