"""The tokenizer of FlexVAR, on anybody's pictures (tokenizers/flexible.py).

`seriatim train image-flexvq --data my_pictures/`.
"""

from __future__ import annotations

from seriatim.systems.meta import Meta
from seriatim.systems.tokenizer_system import TokenizerSystem
from seriatim.tokenizers.flexible import FlexConfig

META = Meta(
    key="image-flexvq",
    title="VQ-VAE of FlexVAR, for maps of any size",
    family="tokenizer",
    modality="image",
    paper="FlexVAR: Flexible Visual Autoregressive Modeling without Residual Prediction (2025), arXiv 2502.20313",
    likelihood="none",
    summary="Pictures as maps of ids of any size, each a coding of the whole picture.",
)


class ImageFlexVQ(TokenizerSystem):
    """Pictures as maps of ids of any size, each a coding of the whole picture."""

    meta, Config, kind = META, FlexConfig, "flexible"
