"""Weights as safetensors, settings as JSON, written beside and renamed: a cut-off write never replaces a good file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def save_weights(module: nn.Module, path: str | os.PathLike[str]) -> Path:
    """All parameters and buffers of a module, without those it shares twice."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    seen: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, x in module.state_dict().items():
        if x.data_ptr() not in seen or x.numel() == 0:
            seen[x.data_ptr()] = name
            tensors[name] = x.detach().contiguous()
    part = path.with_name(path.name + ".part")
    save_file(tensors, part)
    os.replace(part, path)
    return path


def load_weights(module: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Fill a module from a file; raises ValueError that says what is missing, left over or of another shape."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); it may have been cut short") from None
    own = module.state_dict()
    shared = {name for name, x in own.items() if name not in tensors and _twin(name, x, own, tensors)}
    missing = [k for k in own if k not in tensors and k not in shared]
    extra = [k for k in tensors if k not in own]
    shapes = [k for k in tensors if k in own and tensors[k].shape != own[k].shape]
    for names, what in ((missing, "lacks"), (extra, "has left over"), (shapes, "has other shapes for")):
        if names:
            raise ValueError(f"{path} {what} {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}: another model?")
    module.load_state_dict(tensors, strict=False)
    return module


def _twin(name: str, x: Tensor, own: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> bool:
    """Is this the same storage as a tensor that is stored under another name?"""
    return any(other != name and other in stored and y.data_ptr() == x.data_ptr() for other, y in own.items())


def save_json(data: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Readable JSON, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)
    return path
