"""pydecode: parallel decoding primitives for PyTorch."""

from . import ranks, trees
from .backends import Backend, BackendUnavailable, backends
from .block_attention import block_attention
from .branch_attention import branch_attention
from .commit import commit
from .commit_kv import commit_kv
from .coupled_accept import coupled_accept
from .earn_credit import earn_credit
from .jacobi_step import jacobi_step
from .merge_states import merge_states
from .ngram_pool import NgramPool
from .ranked_attention import ranked_attention
from .rejection_sample import rejection_sample
from .rejection_sample_tree import rejection_sample_tree
from .remask import remask
from .results import Scores, Unmasked, Verified
from .sample_and_score import sample_and_score
from .soft_embed import soft_embed
from .tree_attention import tree_attention
from .unmask import unmask
from .validation import checks
from .verify_greedy import verify_greedy
from .verify_states import verify_states
from .version import __version__
from .warmup import warmup
from .write_kv import write_kv

__all__ = [
    "Backend",
    "BackendUnavailable",
    "NgramPool",
    "Scores",
    "Unmasked",
    "Verified",
    "__version__",
    "backends",
    "block_attention",
    "branch_attention",
    "checks",
    "commit",
    "commit_kv",
    "coupled_accept",
    "earn_credit",
    "jacobi_step",
    "merge_states",
    "ranked_attention",
    "ranks",
    "rejection_sample",
    "rejection_sample_tree",
    "remask",
    "sample_and_score",
    "soft_embed",
    "tree_attention",
    "trees",
    "unmask",
    "verify_greedy",
    "verify_states",
    "warmup",
    "write_kv",
]
