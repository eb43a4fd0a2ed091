"""Python's own standard library as text: source files, split by a hash of their path, so that nothing is downloaded.

`test`, `idlelib` and `encodings` are left out (repetitive, or tables). The side of a file is a hash of its relative
path: the same file is on the same side on every machine.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

LEFT_OUT = {"test", "tests", "idlelib", "encodings", "site-packages", "__pycache__", "lib2to3", "turtledemo"}


@dataclass(frozen=True)
class Text:
    """Bytes for training and held-out ones; files follow each other, parted by a zero byte."""

    train: UInt8[Tensor, " n"]
    test: UInt8[Tensor, " m"]


@lru_cache(maxsize=1)
def load_stdlib(held_out: float = 0.05) -> Text:
    """Source of the running Python's standard library. Raises FileNotFoundError where Python came without it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sides: dict[bool, list[bytes]] = {True: [], False: []}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if LEFT_OUT & set(relative.parts):
            continue
        try:
            content = path.read_bytes()
        except OSError:
            continue
        share = int.from_bytes(hashlib.sha256(relative.as_posix().encode()).digest()[:4], "big") / 2**32
        sides[share >= held_out].append(content + b"\0")
    if not sides[True] or not sides[False]:
        raise FileNotFoundError(f"no source files under {root}: this Python came without its standard library's source")
    train, test = (torch.from_numpy(np.frombuffer(b"".join(sides[s]), dtype=np.uint8).copy()) for s in (True, False))
    return Text(train, test)


def windows(
    text: UInt8[Tensor, " n"], count: int, length: int, generator: torch.Generator
) -> UInt8[Tensor, "count length"]:
    """Random windows of a text. Raises ValueError where the text is shorter than one window."""
    if len(text) < length:
        raise ValueError(f"the text has {len(text)} bytes, a window takes {length}; use more text or a shorter length")
    start = torch.randint(len(text) - length + 1, (count,), generator=generator)
    return text[start[:, None] + torch.arange(length)].long()
