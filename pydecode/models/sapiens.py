"""Sapiens (MIT): a real masked language model over antibody sequences, from PyPI, 570 k parameters.

RoBERTa (Liu et al., 2019) with 4 post-norm layers, trained on human antibodies (Prihoda et al.,
"BioPhi", mAbs 2022). Small enough for a test, real enough to unmask a sequence with: the attention
is ``block_attention``, so that a sequence can be denoised as a block over cached K/V.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import pydecode

from . import package_folder

INSTALL = "pip install --no-deps sapiens==1.0.5"
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
RESIDUES = "ACDEFGHIKLMNPQRSTVWY"  # ids from 4 on
BOS, PAD, EOS, UNKNOWN, MASK = 0, 1, 2, 3, 24
FIRST_POSITION = PAD + 1  # fairseq's embeddings of positions begin behind the padding's

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [B, L, H, D] -> [B, L, H, D]

# Variable regions of well-known therapeutic antibodies, to show the model on: heavy and light.
# Written down from memory, not from a database: material for a demonstration, not for biology.
SEQUENCES = {
    "trastuzumab": (
        "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSL"
        "RAEDTAVYYCSRWGGDGFYAMDYWGQGTLVTVSS"
    ),
    "adalimumab": (
        "EVQLVESGGGLVQPGRSLRLSCAASGFTFDDYAMHWVRQAPGKGLEWVSAITWNSGHIDYADSVEGRFTISRDNAKNSLYLQMNSL"
        "RAEDTAVYYCAKVSYLSTASSLDYWGQGTLVTVSS"
    ),
    "bevacizumab": (
        "EVQLVESGGGLVQPGGSLRLSCAASGYTFTNYGMNWVRQAPGKGLEWVGWINTYTGEPTYAADFKRRFTFSLDTSKSTAYLQMNSL"
        "RAEDTAVYYCAKYPHYYGSSHWYFDVWGQGTLVTVSS"
    ),
    "pembrolizumab": (
        "QVQLVQSGVEVKKPGASVKVSCKASGYTFTNYYMYWVRQAPGQGLEWMGGINPSNGGTNFNEKFKNRVTLTTDSSTTTAYMELKSL"
        "QFDDTAVYYCARRDYRFDMGFDYWGQGTTVTVSS"
    ),
    "nivolumab": (
        "QVQLVESGGGVVQPGRSLRLDCKASGITFSNSGMHWVRQAPGKGLEWVAVIWYDGSKRYYADSVKGRFTISRDNSKNTLFLQMNSL"
        "RAEDTAVYYCATNDDYWGQGTLVTVSS"
    ),
    "ipilimumab": (
        "QVQLVESGGGVVQPGRSLRLSCAASGFTFSSYTMHWVRQAPGKGLEWVTFISYDGNNKYYADSVKGRFTISRDNSKNTLYLQMNSL"
        "RAEDTAIYYCARTGWLGPFDYWGQGTLVTVSS"
    ),
    "atezolizumab": (
        "EVQLVESGGGLVQPGGSLRLSCAASGFTFSDSWIHWVRQAPGKGLEWVAWISPYGGSTYYADSVKGRFTISADTSKNTAYLQMNSL"
        "RAEDTAVYYCARRHWPGGFDYWGQGTLVTVSS"
    ),
}
LIGHT_SEQUENCES = {
    "trastuzumab": (
        "DIQMTQSPSSLSASVGDRVTITCRASQDVNTAVAWYQQKPGKAPKLLIYSASFLYSGVPSRFSGSRSGTDFTLTISSLQPEDFATY"
        "YCQQHYTTPPTFGQGTKVEIK"
    ),
}


def load(chain: str = "heavy") -> "SapiensModel":
    """The model of "heavy" or "light" chains.

    Raises:
        pydecode.models.ModelMissing: the package is missing; the message says what to install.

    >>> model = load()  # doctest: +SKIP
    >>> logits = model(model.encode("EVQLVESGGGLVQPGG?????")[None])  # doctest: +SKIP
    """
    if chain not in ("heavy", "light"):
        raise ValueError(f"chain: expected one of heavy, light, got {chain!r}")
    folder = package_folder("sapiens", INSTALL)
    path = folder / "models" / "v1" / f"checkpoint_v{chain[0]}.pt"
    with torch.serialization.safe_globals([argparse.Namespace]):  # its training arguments
        weights = torch.load(path, weights_only=True, map_location="cpu")["model"]
    state = {
        name.removeprefix("decoder.").removeprefix("sentence_encoder."): x
        for name, x in weights.items()
    }
    model = SapiensModel(num_positions=len(state["embed_positions.weight"]))
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


class SapiensModel(nn.Module):
    """tokens [B, L] -> logits [B, L, 25]; every row sees its whole sequence.

    It is a model of ``decode.diffusion.generate`` too, which hands it the rest of the arguments:
    then the rows attend through the loop's block cache.
    """

    mask_id = MASK
    vocab_size = len(SPECIAL) + len(RESIDUES) + 1

    def __init__(
        self,
        num_positions: int = 146,
        num_layers: int = 4,
        width: int = 128,
        num_heads: int = 8,
        ffn: int = 256,
    ) -> None:
        super().__init__()
        self.heads = (num_heads, width // num_heads)
        self.embed_tokens = nn.Embedding(self.vocab_size, width)
        self.embed_positions = nn.Embedding(num_positions, width)
        self.emb_layer_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(_Layer(width, num_heads, ffn) for _ in range(num_layers))
        self.lm_head = _Head(width, self.vocab_size)

    @property
    def max_length(self) -> int:
        """The longest sequence, with its start and end tokens."""
        return self.embed_positions.num_embeddings - FIRST_POSITION

    @torch.no_grad()
    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cache: Any = None,
        mask: Tensor | None = None,
        keep: slice | Tensor | None = None,
    ) -> Tensor:
        """Logits of whole sequences [B, L], padded at the end with ``<pad>``; or of rows in a loop.

        Args:
            positions: [B, L], counted from a sequence's start; None: 0, 1, ..
            cache: whose ``attend(layer, q, k, v, mask)`` is the attention; None: the rows see each
                other, less the padding. mask: handed on to it. keep: rows whose logits are wanted.
        """
        L = tokens.shape[1]
        if cache is None and mask is not None:
            raise ValueError("mask: expected None without a cache, got a tensor")
        if positions is None:
            if self.max_length < L:
                raise ValueError(f"tokens: expected at most {self.max_length} rows, got {L}")
            positions = torch.arange(L, device=tokens.device)[None]
        num_tokens = (tokens != PAD).sum(-1)

        def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if cache is not None:
                return cache.attend(i, q, k, v, mask)
            out = pydecode.block_attention(
                *(q, k[:, :0], v[:, :0], k, v), cache_seqlens=0, num_tokens=num_tokens
            )
            assert isinstance(out, Tensor)  # no lse was asked for
            return out

        x = self.embed_tokens(tokens) + self.embed_positions(positions + FIRST_POSITION)
        x = self.emb_layer_norm(x)
        for i, layer in enumerate(self.layers):
            x = layer(x, partial(attend, i))
        return self.lm_head(x if keep is None else x[:, keep])

    def new_kv(self, batch: int, length: int) -> tuple[Tensor, Tensor]:
        """An empty K/V cache for the diffusion loop, each [layers, B, length, H, D]."""
        weight = self.embed_tokens.weight
        shape = (len(self.layers), batch, length, *self.heads)
        return weight.new_zeros(shape), weight.new_zeros(shape)

    def encode(self, sequence: str) -> Tensor:
        """Token ids [L + 2] of a sequence of residues; ``?`` and ``*`` are masks.

        >>> SapiensModel().encode("AC?").tolist()
        [0, 4, 5, 24, 2]
        """
        ids = [MASK if x in "?*" else _IDS.get(x, UNKNOWN) for x in sequence]
        return torch.tensor([BOS, *ids, EOS])

    def decode(self, tokens: Tensor) -> str:
        """The sequence of token ids [L]; special tokens are left out, a mask is ``?``."""
        return "".join(_LETTERS.get(i, "") for i in tokens.tolist())


_IDS = {x: len(SPECIAL) + i for i, x in enumerate(RESIDUES)}
_LETTERS = {i: x for x, i in _IDS.items()} | {MASK: "?", UNKNOWN: "X"}


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.heads = (num_heads, width // num_heads)
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        q, k, v = (f(x).unflatten(-1, self.heads) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(q, k, v).flatten(-2))


class _Layer(nn.Module):
    """Post-norm: each sum is normalised."""

    def __init__(self, width: int, num_heads: int, ffn: int) -> None:
        super().__init__()
        self.self_attn = _Attention(width, num_heads)
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, ffn), nn.Linear(ffn, width)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        x = self.self_attn_layer_norm(x + self.self_attn(x, attend))
        return self.final_layer_norm(x + self.fc2(nn.functional.gelu(self.fc1(x))))


class _Head(nn.Module):
    """The language model's head; its output weights are the token embeddings' in the checkpoint."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.dense, self.layer_norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.weight = nn.Parameter(torch.zeros(vocab_size, width))
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer_norm(nn.functional.gelu(self.dense(x)))
        return nn.functional.linear(x, self.weight, self.bias)
