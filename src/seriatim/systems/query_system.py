"""Systems over a line of ids that queries make of a picture (tokenizers/queries.py), in groups from coarse to fine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, get_args

from seriatim.data.base import Data
from seriatim.systems.image.raster_ar import Form
from seriatim.systems.image_system import ImageSystem
from seriatim.systems.raster_system import RasterSystem
from seriatim.tokenizers.files import KINDS


@dataclass(frozen=True)
class QueryConfig:
    """Sizes of a generator over `groups` groups of `group_size` ids. form, hidden: as of raster-ar."""

    groups: int = 8
    group_size: int = 4
    vocab: int = 256
    classes: int = 62
    width: int = 96
    depth: int = 4
    heads: int = 4
    dropout: float = 0.1
    form: Form = "driven"
    hidden: int | None = None

    def __post_init__(self) -> None:
        if min(self.groups, self.group_size) < 1:
            raise ValueError(f"there is at least 1 group of at least 1 id, got {self.groups} of {self.group_size}")
        if self.form not in get_args(Form):
            raise ValueError(f"form is one of {', '.join(get_args(Form))}, got {self.form!r}")


class QuerySystem(ImageSystem):
    """`codes`: the kind of tokenizer that makes the line."""

    codes: ClassVar[str]
    source = "glyphs"
    placed = False  # groups and places of a line, not of the picture
    tokenizer_settings = MappingProxyType({})
    sizes, recipes = RasterSystem.sizes, RasterSystem.recipes

    @classmethod
    def tokenizer_for(cls, shape: Sequence[int]) -> str:
        return cls.tokenizers[0]

    @classmethod
    def known(cls, tokenizer: Any, data: Data) -> dict[str, Any]:
        if not isinstance(tokenizer, KINDS[cls.codes][1]):
            raise ValueError(f"{cls.meta.key} needs a {cls.codes} tokenizer: a run of {cls.tokenizers[0]}")
        groups, size = tokenizer.grid  # type: ignore[attr-defined]
        return {**super().known(tokenizer, data), "groups": groups, "group_size": size}
