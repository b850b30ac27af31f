"""Drafters for the speculative loop: prompt lookup, a draft model, skipped layers of the model.

A drafter proposes what may come next; it can cost speed, never correctness.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

import pydecode
from pydecode import trees

from .cache import PagedCache
from .prefill import prefill


class Draft(NamedTuple):
    """Drafted rows: a chain [B, G] behind the last token, or a tree [B, T] whose node 0 it is."""

    tokens: Tensor
    num_drafts: Tensor  # [B]: drafted tokens, or nodes after the root, that are valid
    parents: Tensor | None = None  # [B|1, T] for trees
    max_depth: int | None = None  # for trees
    logits: Tensor | None = None  # what the drafts were drawn from; None: chosen, not drawn
    full: bool = False  # the host knows that every row of every request is valid

    @property
    def num_tokens(self) -> Tensor | None:
        """Valid rows in flight, [B]; None: all."""
        return None if self.full else self.num_drafts + 1

    def rows(self, last: Tensor) -> Tensor:
        """The rows in flight, [B, N]: the last committed token first."""
        if self.parents is None:
            return torch.cat([last[:, None], self.tokens], dim=1)
        return torch.cat([last[:, None], self.tokens[:, 1:].clamp(min=0)], dim=1)

    def depths(self, rows: Tensor) -> Tensor:
        """How far each row lies behind row 0, [B|1, N]."""
        if self.parents is None:
            return torch.arange(rows.shape[1], device=rows.device)[None]
        return trees.depths(self.parents)

    def mask(self) -> Tensor | str:
        return "causal" if self.parents is None else trees.mask_from_parents(self.parents)


class Drafter(Protocol):
    """What the loop asks of a drafter."""

    def start(self, sequences: Sequence[list[int]], cache: PagedCache) -> None:
        """A new generation begins; ``sequences`` are the prompts."""

    def propose(
        self, sequences: Sequence[list[int]], last: Tensor, cache: PagedCache, room: list[int]
    ) -> Draft:
        """Drafts at most ``room[b]`` tokens deep behind the last token of each sequence."""

    def update(self, accepted: list[int]) -> None:
        """How many drafts of the last proposal were accepted."""


class Nothing:
    """Drafts nothing: plain decoding, one token a step."""

    def start(self, sequences: Sequence[list[int]], cache: PagedCache) -> None:
        pass

    def propose(
        self, sequences: Sequence[list[int]], last: Tensor, cache: PagedCache, room: list[int]
    ) -> Draft:
        empty = torch.empty(len(sequences), 0, dtype=torch.int64, device=last.device)
        return Draft(empty, torch.zeros_like(last), full=True)

    def update(self, accepted: list[int]) -> None:
        pass


class PromptLookup:
    """Continuations of earlier occurrences of the last few tokens (Saxena, "Prompt lookup", 2023).

    The longest suffix of at most ``max_ngram`` and at least ``min_ngram`` tokens that occurred
    before is looked up. ``candidates=1`` drafts what followed its latest occurrence, as a chain;
    more candidates (distinct continuations, latest first) become a trie. The draft length adapts
    per request: it doubles, up to ``max_tokens``, while everything is accepted, and falls back
    to one more than what was accepted, from ``num_tokens`` at the start. A match of ``max_ngram``
    tokens is hardly chance, and drafts ``max_tokens`` at once, until a draft is mostly rejected.
    """

    def __init__(
        self,
        *,
        num_tokens: int = 8,
        max_tokens: int = 32,
        max_ngram: int = 5,
        min_ngram: int = 2,
        candidates: int = 1,
    ) -> None:
        self.num_tokens, self.max_tokens, self.candidates = num_tokens, max_tokens, candidates
        self.ngrams = range(max_ngram, min_ngram - 1, -1)

    def start(self, sequences: Sequence[list[int]], cache: PagedCache) -> None:
        self.budget = [self.num_tokens] * len(sequences)
        self.proposed = [0] * len(sequences)
        self.trusted = [True] * len(sequences)  # whether a long match drafts max_tokens at once
        # n-gram -> positions behind its occurrences, grown as the sequences grow
        self.index: list[dict[tuple[int, ...], list[int]]] = [{} for _ in sequences]
        self.indexed = [0] * len(sequences)

    def propose(
        self, sequences: Sequence[list[int]], last: Tensor, cache: PagedCache, room: list[int]
    ) -> Draft:
        found = []
        for b, sequence in enumerate(sequences):
            self._grow(b, sequence)
            found.append(self._lookup(b, sequence, room[b]))
            self.proposed[b] = max(map(len, found[b]), default=0)
        width = max(self.proposed, default=0)
        if self.candidates == 1:
            chains = [candidates[0] if candidates else [] for candidates in found]
            rows = [chain + [0] * (width - len(chain)) for chain in chains]
            return Draft(
                torch.tensor(rows, dtype=torch.int64, device=last.device).view(len(chains), width),
                torch.tensor([len(chain) for chain in chains], device=last.device),
                full=all(len(chain) == width for chain in chains),
            )
        count = max(map(len, found), default=0)
        if count == 0:
            return Nothing().propose(sequences, last, cache, room)
        # distinct prefixes are the trie's nodes: the host knows how many there are
        nodes = [len({tuple(c[: i + 1]) for c in cs for i in range(len(c))}) for cs in found]
        padded = [[c + [-1] * (width - len(c)) for c in cs] for cs in found]
        padded = [cs + [[-1] * width] * (count - len(cs)) for cs in padded]
        candidates = torch.tensor(padded, dtype=torch.int64, device=last.device)
        counts = torch.tensor([len(cs) for cs in found], device=last.device)
        tree, tokens = trees.from_sequences(candidates, counts)
        used = slice(max(nodes) + 1)  # nodes that are used come first
        return Draft(
            tokens[:, used],
            torch.tensor(nodes, device=last.device),
            tree.parents[:, used],
            width,
            full=all(n == max(nodes) for n in nodes),
        )

    def update(self, accepted: list[int]) -> None:
        for b, (a, proposed) in enumerate(zip(accepted, self.proposed)):
            if proposed:
                self.budget[b] = min(2 * proposed, self.max_tokens) if a >= proposed else a + 1
                self.trusted[b] = 2 * a >= proposed

    def _grow(self, b: int, sequence: list[int]) -> None:
        index = self.index[b]
        for end in range(self.indexed[b] + 1, len(sequence)):
            for n in self.ngrams:
                if n <= end:
                    index.setdefault(tuple(sequence[end - n : end]), []).append(end)
        self.indexed[b] = max(self.indexed[b], len(sequence) - 1)

    def _lookup(self, b: int, sequence: list[int], room: int) -> list[list[int]]:
        """Distinct continuations, of the longest n-gram first, each at most ``room`` tokens."""
        found: list[list[int]] = []
        if room <= 0:
            return found
        for n in self.ngrams:
            sure = n == self.ngrams.start and self.trusted[b]
            length = min(self.max_tokens if sure else self.budget[b], room)
            for end in reversed(self.index[b].get(tuple(sequence[-n:]), ())):
                continuation = sequence[end : end + length]
                if all(continuation != c[: len(continuation)] for c in found):
                    found.append(continuation)
                if len(found) == self.candidates:
                    return found
            if found and self.candidates == 1:
                break
        return found


class ModelDrafter:
    """A draft model, or the model itself less some layers, drafts a chain or a tree.

    ``model`` is a callable as in ``speculative``. With a ``cache`` of its own it is a separate
    draft model, which reads each generation's prompts from the start; with ``cache=None`` it
    shares the target's cache (skipped layers: Zhang et al., "Draft & verify", ACL 2024), where
    verification overwrites what it wrote. ``branching`` gives the children of every node, level by
    level: (1, 1, 1, 1) is a chain of four. Greedy drafts take the best tokens; with a temperature
    they are drawn i.i.d. and their law is handed on. A request's chain ends with its first token
    below ``min_confidence``, the draft model's own probability of it (which biases nothing: it is
    known from the draft alone); where that is not 0, the host reads one flag a drafted token.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        *,
        branching: Sequence[int] = (1, 1, 1, 1),
        cache: PagedCache | None = None,
        min_confidence: float = 0.0,
        temperature: float = 0.0,
        seed: int | Tensor = 0,
        **filters: Any,
    ) -> None:
        if min_confidence and max(branching, default=1) > 1:
            raise ValueError("min_confidence: expected 0 with a tree")
        self.model, self.branching, self.own_cache = model, tuple(branching), cache
        self.min_confidence = min_confidence
        self.temperature, self.seed, self.filters = temperature, seed, filters

    def start(self, sequences: Sequence[list[int]], cache: PagedCache) -> None:
        self.valid = [0] * len(sequences)  # tokens whose K/V a draft cache of its own holds
        self.drafted = 0

    def propose(
        self, sequences: Sequence[list[int]], last: Tensor, cache: PagedCache, room: list[int]
    ) -> Draft:
        depth = min(len(self.branching), max(room))
        if depth <= 0:
            self.drafted = 0
            return Nothing().propose(sequences, last, cache, room)
        is_chain, rows = max(self.branching) == 1, last[:, None]
        if self.own_cache is not None:  # catch up with what was committed since
            cache = self.own_cache
            cache.lengths[:] = torch.tensor(self.valid, device=last.device)
            behind = [s[v:-1] for s, v in zip(sequences, self.valid)]
            if is_chain and min(map(len, behind)):  # a chain's first pass takes one token more
                before = torch.tensor([x.pop() for x in behind], device=last.device)
                rows = torch.stack([before, last], dim=1)
            prefill(self.model, behind, cache, 512)
        self.drafted = depth
        self.context = [len(s) for s in sequences]
        limit = torch.tensor([max(r, 0) for r in room], device=last.device)
        length = cache.lengths.clone()
        try:
            if is_chain:
                return self._chain(rows, cache, depth, limit)
            return self._tree(last, cache, depth, limit)
        finally:
            cache.lengths[:] = length

    def update(self, accepted: list[int]) -> None:
        if self.own_cache is not None and self.drafted:
            # a chain's accepted drafts have their K/V already; the last drafted token has none
            kept = self.drafted - 1 if max(self.branching) == 1 else 0
            self.valid = [n + min(a, kept) for n, a in zip(self.context, accepted)]

    def _sample(self, logits: Tensor, first: Tensor, index: int) -> pydecode.Scores:
        """One token a row, [B, 1, V] -> [B, 1], and its probability.

        Keyed by the position of the draft's first token, which is new in every step, and by the
        token's index in the draft. (Its own position would come again after a rejection, and a
        draw that the block and traversal rules have looked at must not be used twice.)
        """
        return pydecode.sample_and_score(
            logits,
            temperature=self.temperature,
            seed=self.seed,
            offset=index,
            positions=first[:, None],
            **self.filters,
        )

    def _chain(self, rows: Tensor, cache: PagedCache, depth: int, limit: Tensor) -> Draft:
        """Drafts behind the last of the rows [B, 1 or 2]."""
        tokens, laws = [], []
        first = cache.lengths + rows.shape[1]
        goes_on, count = limit > 0, torch.zeros_like(limit)
        for i in range(depth):
            at = torch.arange(rows.shape[1], device=rows.device)
            keep = at[-1:] if len(at) > 1 else None
            logits = self.model(rows, cache.lengths[:, None] + at, cache, "causal", keep=keep)
            cache.lengths += len(at)
            drawn = self._sample(logits, first, i)
            rows = drawn.tokens
            tokens.append(rows)
            laws.append(logits)
            count += goes_on & (i < limit)
            if self.min_confidence:
                goes_on &= drawn.confidence[:, 0] >= self.min_confidence
                if not bool(goes_on.any()):
                    break
        self.drafted = len(laws)
        law = torch.cat(laws, dim=1) if self.temperature else None
        return Draft(torch.cat(tokens, dim=1), count, logits=law, full=len(limit) == 1)

    def _tree(self, last: Tensor, cache: PagedCache, depth: int, limit: Tensor) -> Draft:
        """Grows the tree level by level; every level is one forward pass over the tree so far."""
        B, device = last.shape[0], last.device
        tokens, parents, level, law = last[:, None], [-1], [0], None
        for children in self.branching[:depth]:
            parent_tensor = torch.tensor([parents], device=device)
            draft = Draft(tokens, torch.zeros_like(last), parent_tensor)
            at = cache.lengths[:, None] + draft.depths(tokens)
            law = self.model(tokens, at, cache, draft.mask())
            for node in list(level):
                rows = law[:, node : node + 1]
                if self.temperature == 0:
                    new = rows[:, 0].topk(children).indices
                else:  # i.i.d. draws
                    nodes = range(len(parents), len(parents) + children)
                    first = cache.lengths + 1
                    new = torch.cat([self._sample(rows, first, n).tokens for n in nodes], dim=1)
                tokens = torch.cat([tokens, new], dim=1)
                parents += [node] * children
            level = list(range(len(parents) - len(level) * children, len(parents)))
        law = self._pad(law, len(parents)) if self.temperature else None
        everything = torch.full((B,), len(parents) - 1, device=device)
        return Draft(
            tokens,
            torch.where(limit > 0, everything, 0),
            torch.tensor([parents], device=device),
            depth,
            law,
        )

    @staticmethod
    def _pad(law: Tensor | None, nodes: int) -> Tensor:
        """Leaves draw no children: rows that nobody reads."""
        assert law is not None
        return torch.nn.functional.pad(law, (0, 0, 0, nodes - law.shape[1]))
