"""The released weights of FlexVAR (Jiao et al. 2025; Hub jiaosiyu1999/FlexVAR) and of SAR (Zhou et al. 2025; Hub
ZGZzz/SAR), which is FlexVAR trained further: d16 to d24, by our names.

Facts of the code: the generator is VAR's without vectors of scales; places are one map of 32 x 32 vectors. The
tokenizer is LlamaGen's, of 8,912 codes of 32 numbers, whose latent is area-downed to each scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from torch import Tensor

from seriatim.interop import llamagen, var
from seriatim.tokenizers.flexible import FlexConfig
from seriatim.tokenizers.multiscale import SCALES

GUIDANCE = {16: 2.2, 20: 2.6, 24: 3.3}  # of SAR, by depth; FlexVAR's is 2.5: those of the released figures
DRAWN = SCALES[16]  # the ten scales of the released figures; others may be asked for


def is_flexvar(weights: Mapping[str, Tensor]) -> bool:
    known = {"word_embed.weight", "pos_1LC", "head_nm.ada_lin.1.weight"} <= weights.keys()
    return known and weights["pos_1LC"].dim() == 4 and "lvl_embed.weight" not in weights


def flexible_of(weights: Mapping[str, Tensor]) -> tuple[FlexConfig, dict[str, Tensor]]:
    """Config and weights of the tokenizer, for pictures of 16 ids a side."""
    config, named = llamagen.vq_of(weights, DRAWN[-1])
    return FlexConfig(**asdict(config), scales=DRAWN), named


def sizes_of(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """width, depth, heads, classes, vocab, dim and grid of a released generator."""
    width, dim = weights["word_embed.weight"].shape
    return var.sizes_of(weights) | {
        "width": width, "dim": dim, "vocab": len(weights["head.weight"]), "grid": weights["pos_1LC"].shape[-1],
    }  # fmt: skip


named_flexvar = var.named_var  # places, too, have one row that is left out
