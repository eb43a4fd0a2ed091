"""The states of a frozen base on a text, computed once and kept in a file: all draft parts train on the same ones.

A file belongs to the weights of the base and to the very ids of its windows, so other data, another tokenizer or window
is another file. It is filled window by window; what a cut-off run has computed is not computed again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.posttraining.drafting import Base
from seriatim.training.checkpoint import save_json
from seriatim.training.precision import autocast

AT_ONCE = 2048  # tokens of a forward
NOTED = 10.0  # seconds between two notes of how far it is

Told = Callable[[int, int], None]  # windows that are done, and how many there are


@dataclass(frozen=True)
class States:
    """Windows of a text and what the base says behind each of their tokens, as training draws them."""

    ids: Int[Tensor, "windows n"]
    state: Float[Tensor, "windows n d"]  # bfloat16, in a file

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: Int[Tensor, " w"], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """ "token": Int[w n], "state": Float[w n d] in bfloat16."""
        return {"token": self.ids[index].long(), "state": self.state[index]}


@dataclass(frozen=True)
class Tokens:
    """Windows of a text alone, for parts that run the base themselves."""

    ids: Int[Tensor, "windows n"]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: Int[Tensor, " w"], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """ "token": Int[w n]."""
        return {"token": self.ids[index].long()}


def windows(ids: Int[Tensor, " n"], length: int, tokens: int) -> Int[Tensor, "windows length"]:
    """Windows of a stream that do not overlap, spread evenly over it: about so many tokens in all, or all there are.
    Raises ValueError where it is shorter than one window."""
    count = min(tokens, len(ids)) // length
    if len(ids) < length:
        raise ValueError(f"the text has {len(ids):,} tokens, and a window takes {length:,}: use more text or --window")
    start = torch.linspace(0, len(ids) - length, max(count, 1), dtype=torch.float64).long()
    return ids[start[:, None] + torch.arange(length)]


def states_of(base: Base, ids: Int[Tensor, "windows n"], home: Path, tell: Told | None = None) -> States:
    """The base's states on these windows, from a file below `home` (made where there is none, or not all of it).

    Raises OSError where there is no room for it. Another process that makes the same file is waited for.
    """
    size = ids.numel() * base.width * 2
    name = blake2b(ids.int().numpy().tobytes(), digest_size=8).hexdigest()
    path = home / f"{base.exact_fingerprint}-{ids.shape[0]}x{ids.shape[1]}-{name}.bf16"
    home.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file():
            _fill(base, ids, path, size, tell)
    kept = torch.from_file(str(path), shared=False, size=size // 2, dtype=torch.bfloat16)
    return States(ids, kept.view(*ids.shape, base.width))


def _fill(base: Base, ids: Int[Tensor, "windows n"], path: Path, size: int, tell: Told | None) -> None:
    """Make the file beside and rename it; how far it is stands in a small file next to it."""
    part, note = path.with_suffix(".part"), path.with_suffix(".json")
    free = shutil.disk_usage(path.parent).free
    if not part.is_file() and free < size:
        raise OSError(
            f"the states of {ids.numel():,} tokens take {size / 1e9:.1f} GB, and {path.parent} has {free / 1e9:.1f} GB "
            "left: take fewer --tokens, or set SERIATIM_HOME to another disk"
        )
    done = json.loads(note.read_text())["windows"] if note.is_file() and part.is_file() else 0
    with open(part, "r+b" if part.is_file() else "w+b") as file:
        file.truncate(size)
    kept = torch.from_file(str(part), shared=True, size=size // 2, dtype=torch.bfloat16).view(*ids.shape, base.width)
    each, noted = max(AT_ONCE // ids.shape[1], 1), time.monotonic()
    for start in range(done, len(ids), each):
        kept[start : start + each] = _states(base, ids[start : start + each])
        done = min(start + each, len(ids))
        if time.monotonic() - noted > NOTED:
            _synchronised(part)
            save_json({"windows": done}, note)
            noted = time.monotonic()
        if tell is not None:
            tell(done, len(ids))
    _synchronised(part)
    os.replace(part, path)
    note.unlink(missing_ok=True)


@torch.no_grad()
def _states(base: Base, ids: Int[Tensor, "w n"]) -> Float[Tensor, "w n d"]:
    """In bfloat16, also where the base is finer."""
    narrow = base.dtype == torch.float32 and base.device.type == "cpu"
    with autocast("cpu", bf16=narrow):
        return base.states(ids.long().to(base.device)).to("cpu", torch.bfloat16)


def _synchronised(path: Path) -> None:
    """What is mapped is on disk before anything says so."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
