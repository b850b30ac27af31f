"""Draft trees: masks, depths, and the ways to build a tree."""

from .choices import from_choices
from .dynamic import dynamic
from .links import from_links, links
from .lookahead import lookahead_mask, lookahead_positions
from .masks import depths, mask_from_parents, pack_mask, unpack_mask
from .prompt import PromptState, PromptTrees, prompt_tree
from .sequences import from_sequences
from .sequoia import expected_tokens, optimal
from .tree import Tree, chain

__all__ = [
    "PromptState",
    "PromptTrees",
    "Tree",
    "chain",
    "depths",
    "dynamic",
    "expected_tokens",
    "from_choices",
    "from_links",
    "from_sequences",
    "links",
    "lookahead_mask",
    "lookahead_positions",
    "mask_from_parents",
    "optimal",
    "pack_mask",
    "prompt_tree",
    "unpack_mask",
]
