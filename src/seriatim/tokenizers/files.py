"""Tokenizers of pictures in files: weights as NAME.safetensors, settings as NAME.json with the `kind` of the class."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import nn

from seriatim.tokenizers.base import PictureTokenizer
from seriatim.tokenizers.detail import DetailConfig, DetailTokenizer
from seriatim.tokenizers.flexible import FlexConfig, FlexTokenizer
from seriatim.tokenizers.kl import KLConfig, KLTokenizer
from seriatim.tokenizers.multiscale import MultiScaleConfig, MultiScaleTokenizer
from seriatim.tokenizers.patches import PatchConfig, PatchTokenizer
from seriatim.tokenizers.pixels import PixelConfig, PixelTokenizer
from seriatim.tokenizers.rings import RingConfig, RingTokenizer
from seriatim.tokenizers.sequential import SequentialConfig, SequentialTokenizer
from seriatim.tokenizers.vq import VQConfig, VQTokenizer
from seriatim.training.checkpoint import load_weights, save_json, save_weights

KINDS: dict[str, tuple[type, type]] = {
    "multi-scale": (MultiScaleConfig, MultiScaleTokenizer),
    "rings": (RingConfig, RingTokenizer),
    "vq": (VQConfig, VQTokenizer),
    "flexible": (FlexConfig, FlexTokenizer),
    "kl": (KLConfig, KLTokenizer),
    "detail": (DetailConfig, DetailTokenizer),
    "sequential": (SequentialConfig, SequentialTokenizer),
    "pixels": (PixelConfig, PixelTokenizer),
    "patches": (PatchConfig, PatchTokenizer),
}
"""Config and class of each kind."""

LARGEST = 1 << 20  # no size in a config is larger: files come from anywhere


def make_tokenizer(kind: str, settings: Mapping[str, Any]) -> PictureTokenizer:
    """A tokenizer with fresh weights. Raises ValueError for an unknown kind, or settings that its config lacks or that
    cannot be."""
    if kind not in KINDS:
        raise ValueError(f"no tokenizer of pictures is called {kind!r}; there are {', '.join(KINDS)}")
    config, cls = KINDS[kind]
    default = config()
    known = {f.name: getattr(default, f.name) for f in fields(config)}
    for name, value in settings.items():
        if name not in known:
            raise ValueError(f"a {kind} tokenizer has no setting {name!r}; it has {', '.join(known)}")
        _check_setting(name, value, known[name])
    return cls(config(**settings))


def _check_setting(name: str, value: Any, default: Any) -> None:
    """Raises ValueError where a value is of another type than the default, or absurdly large."""
    if default is None and value is None:
        return
    many = isinstance(default, tuple)
    for x in value if many and isinstance(value, (list, tuple)) else (value,):
        kind = int if many else float if default is None else type(default)
        fits = type(x) is kind or (kind is float and type(x) is int)
        if not fits or (type(x) is int and abs(x) > LARGEST):
            raise ValueError(f"{name} is {'a list of int' if many else kind.__name__}, got {value!r}")


def save_tokenizer(tokenizer: PictureTokenizer, folder: str | os.PathLike[str], name: str = "tokenizer") -> Path:
    """Write NAME.safetensors and NAME.json into a folder; returns the folder."""
    assert isinstance(tokenizer, nn.Module)
    folder = Path(folder)
    save_weights(tokenizer, folder / f"{name}.safetensors")
    save_json({"kind": tokenizer.kind, **asdict(tokenizer.config)}, folder / f"{name}.json")
    return folder


def load_tokenizer(path: str | os.PathLike[str]) -> PictureTokenizer:
    """A saved tokenizer, in evaluation mode: `path` is its folder, its NAME.json or its NAME.safetensors.

    Raises FileNotFoundError where a file is missing, ValueError where one is not what it should be.
    """
    path = Path(path)
    settings = path / "tokenizer.json" if path.is_dir() else path.with_suffix(".json")
    if not settings.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}: {settings.name} is missing")
    try:
        said = json.loads(settings.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{settings} is not JSON ({error}); it may have been cut short") from None
    if not isinstance(said, dict) or not isinstance(said.get("kind"), str):
        raise ValueError(f"{settings} describes no tokenizer of pictures: it names no kind ({', '.join(KINDS)})")
    kind = said.pop("kind")
    try:
        tokenizer = make_tokenizer(kind, said)
    except ValueError as error:
        raise ValueError(f"{settings}: {error}") from None
    assert isinstance(tokenizer, nn.Module)
    load_weights(tokenizer, settings.with_suffix(".safetensors"))
    return tokenizer.eval()
