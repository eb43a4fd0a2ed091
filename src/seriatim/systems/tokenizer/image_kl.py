"""A KL-regularised autoencoder, as MAR uses it, on anybody's pictures (tokenizers/kl.py).

`seriatim train image-kl --data my_pictures/`.
"""

from __future__ import annotations

from seriatim.systems.meta import Meta
from seriatim.systems.tokenizer_system import TokenizerSystem
from seriatim.tokenizers.kl import KLConfig

META = Meta(
    key="image-kl",
    title="KL-regularised autoencoder, as MAR uses it",
    family="tokenizer",
    modality="image",
    paper="Autoregressive Image Generation without Vector Quantization (2024), arXiv 2406.11838",
    likelihood="none",
    summary="Pictures as a grid of continuous latents of about unit variance.",
)


class ImageKL(TokenizerSystem):
    """Pictures as a grid of continuous latents of about unit variance."""

    meta, Config, kind = META, KLConfig, "kl"
