"""The tokenizer of DetailFlow, on anybody's pictures (tokenizers/detail.py).

`seriatim train image-detail --data my_pictures/`.
"""

from __future__ import annotations

from types import MappingProxyType

from seriatim.systems.meta import Meta
from seriatim.systems.tokenizer_system import TokenizerSystem
from seriatim.tokenizers.detail import DetailConfig
from seriatim.training.recipe import Recipe

META = Meta(
    key="image-detail",
    title="Next-detail tokenizer of DetailFlow",
    family="tokenizer",
    modality="image",
    paper="DetailFlow: 1D Coarse-to-Fine Autoregressive Image Generation via Next-Detail Prediction (2025), 2505.21473",
    likelihood="none",
    summary="Pictures as a line of ids, any prefix of which is the picture at a lower resolution.",
)


class ImageDetail(TokenizerSystem):
    """Pictures as a line of ids, any prefix of which is the picture at a lower resolution."""

    meta, Config, kind = META, DetailConfig, "detail"
    recipes = MappingProxyType({
        "tiny": Recipe(1500, batch=32, learning_rate=1e-3, weight_decay=0.01, ema=0.99),
        "photos": Recipe(250_000, batch=256, learning_rate=1e-4, weight_decay=1e-4, bf16=True, ema=0.999),
    })  # fmt: skip
