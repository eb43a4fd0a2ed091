"""A convolutional VQ-VAE in LlamaGen's form, on anybody's pictures (tokenizers/vq.py).

`seriatim train image-vq --data my_pictures/`.
"""

from __future__ import annotations

from seriatim.systems.meta import Meta
from seriatim.systems.tokenizer_system import TokenizerSystem
from seriatim.tokenizers.vq import VQConfig

META = Meta(
    key="image-vq",
    title="Convolutional VQ-VAE in LlamaGen's form",
    family="tokenizer",
    modality="image",
    paper="Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation (2024), arXiv 2406.06525",
    likelihood="none",
    summary="Pictures as a grid of ids of unit-length codes; made for raster order.",
)


class ImageVQ(TokenizerSystem):
    """Pictures as a grid of ids of unit-length codes; made for raster order."""

    meta, Config, kind = META, VQConfig, "vq"
