"""A binary autoencoder, as ELM has it: pictures as a grid of bits (tokenizers/bernoulli.py).

`seriatim train image-bae --data my_pictures/`.
"""

from __future__ import annotations

from dataclasses import dataclass

from seriatim.systems.meta import Meta
from seriatim.systems.tokenizer_system import TokenizerSystem
from seriatim.tokenizers.vq import QuantizerName, VQConfig

META = Meta(
    key="image-bae",
    title="Binary autoencoder",
    family="tokenizer",
    modality="image",
    paper="Elucidating the design space of language models for image generation (2024), arXiv 2410.16257",
    likelihood="none",
    summary="Pictures as a grid of drawn bits: all codes in use, without a codebook.",
)


@dataclass(frozen=True, kw_only=True)
class BAEConfig(VQConfig):
    """As of image-vq, with ten bits a place."""

    vocab: int = 1024
    quantizer: QuantizerName = "bernoulli"


class ImageBAE(TokenizerSystem):
    """Pictures as a grid of bits."""

    meta, Config, kind = META, BAEConfig, "vq"
