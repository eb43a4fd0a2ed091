"""Data <-> ids or latents."""

from seriatim.tokenizers.base import PictureTokenizer
from seriatim.tokenizers.conv import ConvDecoder, ConvEncoder, ResidualDecoder, ResidualEncoder
from seriatim.tokenizers.detail import Corrupted, DetailConfig, DetailTokenizer
from seriatim.tokenizers.files import KINDS, load_tokenizer, make_tokenizer, save_tokenizer
from seriatim.tokenizers.flexible import FlexConfig, FlexTokenizer
from seriatim.tokenizers.kl import KLConfig, KLTokenizer, Posterior
from seriatim.tokenizers.losses import LossConfig, PatchCritic, PictureLoss, feature_distance, feature_maps
from seriatim.tokenizers.multiscale import (
    MultiScaleConfig,
    MultiScaleTokenizer,
    MultiScaleVQ,
    ScaleStep,
    phi_table,
)
from seriatim.tokenizers.patches import PatchConfig, PatchTokenizer
from seriatim.tokenizers.pixels import PixelConfig, PixelTokenizer
from seriatim.tokenizers.quantizers import BSQ, IBQ, VQ, NormalizedVQ, Quantized, Quantizer
from seriatim.tokenizers.report import report, ssim
from seriatim.tokenizers.sequential import SequentialConfig, SequentialTokenizer, Stream
from seriatim.tokenizers.vq import VQConfig, VQTokenizer

__all__ = [
    "PictureTokenizer",
    "load_tokenizer",
    "save_tokenizer",
    "make_tokenizer",
    "KINDS",
    "MultiScaleConfig",
    "MultiScaleTokenizer",
    "MultiScaleVQ",
    "ScaleStep",
    "phi_table",
    "VQConfig",
    "VQTokenizer",
    "FlexConfig",
    "FlexTokenizer",
    "DetailConfig",
    "DetailTokenizer",
    "Corrupted",
    "SequentialConfig",
    "SequentialTokenizer",
    "Stream",
    "KLConfig",
    "KLTokenizer",
    "Posterior",
    "PixelConfig",
    "PixelTokenizer",
    "PatchConfig",
    "PatchTokenizer",
    "Quantizer",
    "Quantized",
    "VQ",
    "NormalizedVQ",
    "IBQ",
    "BSQ",
    "ConvEncoder",
    "ConvDecoder",
    "ResidualEncoder",
    "ResidualDecoder",
    "LossConfig",
    "PictureLoss",
    "PatchCritic",
    "feature_distance",
    "feature_maps",
    "report",
    "ssim",
]
