"""Weights that researchers publish as .pth and .pt files: read without running anything that stands in them."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

WITHIN = ("model_ema", "ema", "model", "state_dict", "trainer", "var_wo_ddp")  # what weights are kept under

COMPILED = "_orig_mod."  # in front of the names of a compiled module


def read_pickled(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file, by name: the averaged weights where it has them. An `argparse.Namespace` beside them (what
    the training was asked) is the one class that is read, too, and left out.

    Raises FileNotFoundError, and ValueError for a file that is cut short, or holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            file = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise ValueError(f"{path} holds more than tensors, and might run anything: it is not read") from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as problem:
        said = str(problem).split("\n", 1)[0]
        raise ValueError(f"{path} is no whole file of weights ({said}); it may have been cut short") from None
    return weights_within(file, path)


def weights_within(file: Any, path: str | Path) -> dict[str, Tensor]:
    """The weights of what a file holds."""
    while isinstance(file, Mapping) and not any(isinstance(x, Tensor) for x in file.values()):
        inner = next((file[name] for name in WITHIN if isinstance(file.get(name), Mapping) and file[name]), None)
        if inner is None:
            break
        file = inner
    if not isinstance(file, Mapping) or not any(isinstance(x, Tensor) for x in file.values()):
        raise ValueError(f"{path} holds no weights by name")
    return {str(name).removeprefix(COMPILED): x for name, x in file.items() if isinstance(x, Tensor)}


def read_safe(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name. Raises ValueError for one that is cut short."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}); it may have been cut short") from None
