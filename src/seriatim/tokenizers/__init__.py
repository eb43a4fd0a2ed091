"""Data <-> ids or latents."""

from seriatim.tokenizers.conv import ConvDecoder, ConvEncoder
from seriatim.tokenizers.multiscale import (
    MultiScaleConfig,
    MultiScaleTokenizer,
    MultiScaleVQ,
    Quantized,
    ScaleStep,
    TokenizerRecipe,
    phi_table,
    train_tokenizer,
)

__all__ = [
    "ConvDecoder",
    "ConvEncoder",
    "MultiScaleConfig",
    "MultiScaleTokenizer",
    "MultiScaleVQ",
    "Quantized",
    "ScaleStep",
    "TokenizerRecipe",
    "phi_table",
    "train_tokenizer",
]
