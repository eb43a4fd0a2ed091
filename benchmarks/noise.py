"""Forward and reverse strips of every noise, and bounds: how samples are taken apart, and put together by a model.

    python benchmarks/noise.py [RUN ...] [--out strips] [--frames 9] [--seed 0]

RUN is a run of d3pm or d3pm-pixels; without any those of their claims (seed 0) that are there. Writes
noise-forward-digits.png and noise-forward-text.png, of all kernels, and a picture of each run both ways, and prints the
bound of each run in bits an element on its own held-out data.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from seriatim.data.base import load_data
from seriatim.evaluation.noise_strips import back, forth, save_picture_strips, save_text_strips
from seriatim.heads.kernels import KERNELS, kernel_of
from seriatim.home import HOME
from seriatim.systems.text.d3pm import letters
from seriatim.systems.text_system import TextSystem
from seriatim.tokenizers.files import make_tokenizer
from seriatim.tokenizers.pieces import pieces
from seriatim.tokenizers.text import ByteTokenizer
from seriatim.training.run import RunFolder
from seriatim.verbs.load import load

WIDE = 72  # letters of a strip
TEXT = "def hear(words):  # Noise takes 3 of 4 letters, order brings them back.\n"


def drawable(tokenizer: Any) -> list[str | None]:
    """One letter of each id."""
    out: list[str | None] = []
    for piece in pieces(tokenizer):
        text = piece.decode("utf-8", "replace") if isinstance(piece, bytes) else ""
        out.append(text[0] if text and text[0].isprintable() and text[0] != "\ufffd" else None)
    return out


def forward_strips(folder: Path, frames: int, seed: int) -> list[Path]:
    """All kernels, on a digit and on a line of text."""
    data = load_data("digits", "image")
    pixels: Any = make_tokenizer("pixels", {"side": 8, "channels": 1, "levels": 17})
    digit = pixels.encode(data.test.take(torch.tensor([3]))["image"])[0]  # type: ignore[union-attr]
    strips = {name: forth(kernel_of(name, 17, 32, near=2), digit, frames, seed) for name in KERNELS}
    one = save_picture_strips(strips, 8, 17, folder / "noise-forward-digits.png")
    tokenizer = ByteTokenizer()
    ids, alike = torch.tensor(tokenizer.encode(TEXT)[:WIDE]), letters(tokenizer)
    lines = {name: forth(kernel_of(name, tokenizer.vocab, 64, alike), ids, frames, seed) for name in KERNELS}
    return [one, save_text_strips(lines, drawable(tokenizer), folder / "noise-forward-text.png")]


def both_ways(place: Path, folder: Path, frames: int, seed: int) -> tuple[Path, str, float]:
    """A held-out sample of a run turned into noise, and noise turned into a sample; its noise, and its bound in bits an
    element."""
    system: Any = load(place)
    noise, path = system.config.noise, folder / f"noise-{system.meta.key}-{system.config.noise}.png"
    card = RunFolder(place).read_card()
    data = load_data(card["data"], "text" if isinstance(system, TextSystem) else "image")
    torch.manual_seed(seed)
    if isinstance(system, TextSystem):
        examples: Any = system.examples(data.test.documents)  # type: ignore[union-attr]
        sample = examples.take(torch.tensor([1000 * (seed + 1)]))["token"][0, :WIDE]
        canvas, target = system.begun([], min(WIDE, system.model.layout.size)), system.target(None, system.sampling)
    else:
        examples = data.test
        batch = examples.take(torch.tensor([seed]))
        sample = system.tokenizer.encode(batch["image"])[0]
        canvas = system.model.blank(1)
        target = system.target(system.condition(batch.get("label"), 1), system.sampling)
    kernel = system.model.kernel
    strips = {"forward": forth(kernel, sample, frames, seed), "reverse": back(target, canvas, frames, seed)}
    if isinstance(system, TextSystem):
        save_text_strips(strips, drawable(system.tokenizer), path)
    else:
        save_picture_strips(strips, system.config.side, system.config.vocab, path)
    with torch.no_grad():
        nats, elements = system.score(examples)
    return path, f"{system.meta.key}, {noise}", nats / elements / math.log(2)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=Path("strips"))
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for path in forward_strips(options.out, options.frames, options.seed):
        print(path)
    runs = options.runs or sorted((HOME / "claims").glob("d3pm*/*-0/run"))
    for place in runs:
        path, name, bits = both_ways(place, options.out, options.frames, options.seed)
        print(f"{path}  {name}: at most {bits:.3f} bits an element", flush=True)


if __name__ == "__main__":
    main()
