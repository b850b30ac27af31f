"""Randomness: how (stream, seed, offset, position, index) become a Philox4x32-10 draw.

This page is the specification that the C++, CUDA and Triton backends repeat bit for bit.
Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

Key (2 x 32 bits)
    k0 = seed & 0xffffffff
    k1 = seed >> 32, of the 64-bit seed of request b. A scalar seed stands for the batch:
         k1 is then (seed >> 32) + b mod 2**32, so that requests never share draws. A [B] seed is
         taken as it is, so that a request's draws do not depend on its batch.
Counter (4 x 32 bits)
    c0 = index            verification: the draft's or node's index, 0xffffffff (-1) for the
                          correction or bonus. Row ops: 0, and v // 4 for Gumbel noise.
    c1 = position & 0xffffffff
    c2 = offset & 0xffffffff
    c3 = stream << 24 | (offset >> 32 & 0xffffff)
Words
    The four output words are x0..x3. One draw takes x0; Gumbel noise of vocabulary entry v takes
    x[v % 4] of the counter with index v // 4.
Numbers
    uniform      u = (x >> 8) * 2**-24, in [0, 1)
    exponential  E = -log1p(-u'), with u' = (x + 0.5) * 2**-32
    Gumbel       g = -log(E)
    u' needs 33 bits: the reference computes it in fp64. In fp32 take 1 - u' = (2**32 - x - 0.5) *
    2**-32 where x >= 2**31, and E = -log of it, for u' itself would round to 1.
Streams
    Drafting, accepting and resampling never share a counter, which a peer did, with a bias.
"""

import torch
from torch import Tensor

DRAFT = 0  # sample_and_score: one uniform a row, or Gumbel noise; coupled_accept regenerates it
ACCEPT = 1  # rejection_sample, rejection_sample_tree: the accept test of a draft or node
RESAMPLE = 2  # their correction or bonus token
COMMIT = 3  # unmask, commit: the Bernoulli draws of the posterior rule
RANDOM_CONFIDENCE = 4  # confidence="random"

MASK32 = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32 on int64 tensors that hold 32-bit words; they broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2**64, which is what the high and low words need.
        p0, p1 = c0 * _M0, c2 * _M1
        hi0, lo0 = (p0 >> 32) & MASK32, p0 & MASK32
        hi1, lo1 = (p1 >> 32) & MASK32, p1 & MASK32
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & MASK32, (k1 + _W1) & MASK32
    return c0, c1, c2, c3


def request_keys(seed: int, seed_tensor: Tensor | None, batch: int, device: torch.device) -> Tensor:
    """The 64-bit seed of every request, [B] int64: a scalar seed gets b added to its high word."""
    if seed_tensor is not None and seed_tensor.dim() == 1:
        return seed_tensor.long()
    if seed_tensor is None:
        base = torch.full((), seed, dtype=torch.int64, device=device)
    else:
        base = seed_tensor.long()
    b = torch.arange(batch, dtype=torch.int64, device=device)
    return base + (b << 32)  # wraps modulo 2**64, so only the high word changes


def words(stream: int, seed: Tensor, offset: Tensor, position: Tensor, index: Tensor) -> Tensor:
    """The four output words as one int64 tensor [..., 4]; the arguments broadcast."""
    seed, offset, position, index = torch.broadcast_tensors(
        seed.long(), offset.long(), position.long(), index.long()
    )
    counter = (
        index & MASK32,
        position & MASK32,
        offset & MASK32,
        (offset >> 32 & 0xFFFFFF) | (stream << 24),
    )
    return torch.stack(philox4x32(counter, (seed & MASK32, (seed >> 32) & MASK32)), dim=-1)


def uniform(stream: int, seed: Tensor, offset: Tensor, position: Tensor, index: Tensor) -> Tensor:
    """u = (x0 >> 8) * 2**-24, fp32 (exact); the arguments broadcast."""
    return (words(stream, seed, offset, position, index)[..., 0] >> 8).float() * 2.0**-24


def gumbel(stream: int, seed: Tensor, offset: Tensor, position: Tensor, vocab: int) -> Tensor:
    """Gumbel noise of every vocabulary entry, fp64 [..., vocab]; the arguments broadcast."""
    index = torch.arange((vocab + 3) // 4, dtype=torch.int64, device=seed.device)
    x = words(stream, seed[..., None], offset[..., None], position[..., None], index)
    x = x.flatten(-2)[..., :vocab]
    exponential = -torch.log1p(-((x.double() + 0.5) * 2.0**-32))
    return -torch.log(exponential)
