"""The sequential diffusion tokenizer of D-AR, on anybody's pictures (tokenizers/sequential.py).

`seriatim train image-sequential --data my_pictures/`.
"""

from __future__ import annotations

from types import MappingProxyType

from seriatim.systems.meta import Meta
from seriatim.systems.tokenizer_system import TokenizerSystem
from seriatim.tokenizers.sequential import SequentialConfig
from seriatim.training.recipe import Recipe

META = Meta(
    key="image-sequential",
    title="Sequential diffusion tokenizer of D-AR",
    family="tokenizer",
    modality="image",
    paper="D-AR: Diffusion via Autoregressive Models (2025), arXiv 2505.23660",
    likelihood="none",
    summary="Pictures as a line of ids whose groups are the steps of a diffusion over pixels.",
)


class ImageSequential(TokenizerSystem):
    """Pictures as a line of ids whose groups are the steps of a diffusion over pixels."""

    meta, Config, kind = META, SequentialConfig, "sequential"
    recipes = MappingProxyType({
        "tiny": Recipe(1500, batch=32, learning_rate=1e-3, weight_decay=0.01, ema=0.99),
        "photos": Recipe(200_000, batch=512, learning_rate=2e-4, weight_decay=0.05, bf16=True, ema=0.999),
    })  # fmt: skip
