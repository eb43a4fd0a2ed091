"""Systems over one map of ids: pixels of small grey pictures, or the ids of a VQ tokenizer, one a place."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, ClassVar

from seriatim.data.base import Data
from seriatim.systems.image_system import ImageSystem
from seriatim.systems.system import Sampling
from seriatim.training.recipe import Recipe


class RasterSystem(ImageSystem):
    """Elements are the places of a square grid, in raster order; the field `side` of a config is its side."""

    tokenizers: ClassVar[tuple[str, ...]] = ("pixels", "image-vq")
    tokenizer_settings = MappingProxyType({"levels": 17})
    sizes = MappingProxyType({
        "tiny": {},
        "small": {"width": 192, "depth": 6, "heads": 6},
        "b": {"width": 768, "depth": 12, "heads": 12},
    })  # fmt: skip
    recipes = MappingProxyType({
        "tiny": Recipe(800, drop=0.1),
        "small": Recipe(4000, batch=64, learning_rate=1e-3, drop=0.1, bf16=True, ema=0.995),
        "b": Recipe(300_000, batch=256, learning_rate=1e-4, drop=0.1, bf16=True, ema=0.9999, compile=True),
    })  # fmt: skip
    sampling = Sampling(top_p=0.96, guidance=0.5)

    @classmethod
    def tokenizer_for(cls, shape: Sequence[int]) -> str:
        """Pixels of small grey pictures, ids of a VQ tokenizer of others."""
        return "pixels" if shape[0] == 1 and shape[1] <= 16 else "image-vq"

    @classmethod
    def known(cls, tokenizer: Any, data: Data) -> dict[str, Any]:
        rows, columns = tokenizer.grid
        if tokenizer.vocab is None or getattr(tokenizer, "depth", 1) != 1 or rows != columns:
            raise ValueError(
                f"{cls.meta.key} needs a tokenizer with one id a place on a square grid: pixels of grey, or image-vq"
            )
        return {**super().known(tokenizer, data), "side": rows}
