"""The frequency-guided residual VQ-VAE of NFIG, on anybody's pictures (tokenizers/rings.py).

`seriatim train image-rings --data my_pictures/`. New in it: each scale codes a ring of frequencies of the latent, and
what the coarser ones left. Departures: our own convolutional encoder (there, as re-implementations have it, a DINOv2).
"""

from __future__ import annotations

from seriatim.systems.meta import Meta
from seriatim.systems.tokenizer_system import TokenizerSystem
from seriatim.tokenizers.rings import RingConfig

META = Meta(
    key="image-rings",
    title="Frequency-guided residual VQ-VAE of NFIG",
    family="tokenizer",
    modality="image",
    paper="NFIG: Multi-Scale Autoregressive Image Generation via Frequency Ordering (2025), arXiv 2503.07076",
    likelihood="none",
    summary="Pictures as a pyramid of ids, each scale a ring of frequencies, from low to high.",
)


class ImageRings(TokenizerSystem):
    """Pictures as a pyramid of ids, each scale a ring of frequencies."""

    meta, Config, kind = META, RingConfig, "rings"
