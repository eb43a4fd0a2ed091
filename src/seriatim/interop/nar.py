"""The released weights of NAR (He et al. 2025; Hub collection chenfeng1271/nar: by class, B to XXL) by our names,
beside LlamaGen's tokenizer.

Facts of the code: all is LlamaGen's, the class of zero queries and keys too; the last layer is that of the head below,
which has a norm and a matrix of its own. Here both heads share a norm, so the weights of each stand in its matrix.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from seriatim.interop import llamagen

BELOW = "medusa_norm.weight", "medusa_output.weight"


def is_nar(weights: Mapping[str, Tensor]) -> bool:
    return llamagen.is_llamagen(weights) and "medusa_output.weight" in weights


def sizes_of(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """vocab, width, depth, heads, hidden and classes of a released generator. Raises ValueError for one that is told
    texts."""
    sizes = llamagen.sizes_of(weights)
    return sizes | {"depth": sizes["depth"] - 1}


def named_nar(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The generator's weights by our names. Unknown ones keep theirs, and are refused by who loads them."""
    named = llamagen.named_llamagen({name: x for name, x in weights.items() if name not in BELOW})
    norm, right = named["backbone.norm"], named["heads.token.weight"]
    below, matrix = (weights[name] for name in BELOW)
    both = torch.cat([matrix * below, right * norm])  # by axis: rows, columns
    return named | {"backbone.norm": torch.ones_like(norm), "heads.token.weight": both}
