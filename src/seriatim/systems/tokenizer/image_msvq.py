"""The multi-scale residual VQ-VAE of VAR, on anybody's pictures (tokenizers/multiscale.py).

`seriatim train image-msvq --data my_pictures/`.
"""

from __future__ import annotations

from seriatim.systems.meta import Meta
from seriatim.systems.tokenizer_system import TokenizerSystem
from seriatim.tokenizers.multiscale import MultiScaleConfig

META = Meta(
    key="image-msvq",
    title="Multi-scale residual VQ-VAE of VAR",
    family="tokenizer",
    modality="image",
    paper="Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction (2024), 2404.02905",
    likelihood="none",
    summary="Pictures as a pyramid of ids, each scale the residual of the coarser ones.",
)


class ImageMSVQ(TokenizerSystem):
    """Pictures as a pyramid of ids, each scale the residual of the coarser ones."""

    meta, Config, kind = META, MultiScaleConfig, "multi-scale"
