"""How noise takes samples apart and how a model puts them together: strips of states, as pictures.

Ids behind the values are masks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.decoding.denoise import Denoise
from seriatim.decoding.loop import decode
from seriatim.decoding.target import Target
from seriatim.evaluation.pictures import ACCENT, INK, PALE, save_grid, write_beside
from seriatim.heads.kernels import Kernel, in_turns
from seriatim.objectives.noised import Noised
from seriatim.random import Generator, Key

MASKED = (0.55, 0.68, 0.9)  # of pictures' masks: red, green, blue in [-1, 1] as ink on paper
LETTER = 13  # points


class Strip(NamedTuple):
    """A few moments of one sample, and the sample without noise."""

    states: Int[Tensor, "frames E"]
    whole: Int[Tensor, "E"]


def moments(steps: int, frames: int) -> list[int]:
    """So many steps from 0 to all, spread evenly."""
    return torch.linspace(0, steps, min(frames, steps + 1)).round().long().tolist()


def forth(kernel: Kernel, value: Int[Tensor, "E"], frames: int = 9, seed: int = 0) -> Strip:
    """From a sample to noise: moments of one run of the chain, step by step."""
    random, x, row = Generator(seed), value[None], torch.zeros(1, dtype=torch.long)
    states = [x]
    for k in range(1, kernel.steps + 1):
        x = random.categorical(kernel.step(k)[x].log(), Key(row, torch.arange(x.shape[1])[None]))
        states.append(x)
    return Strip(torch.cat(states)[moments(kernel.steps, frames)], value)


@torch.inference_mode()
def back(target: Target, canvas: Canvas, frames: int = 9, seed: int = 0, turns: int | None = None) -> Strip:
    """From noise to a sample: moments of the generation of a canvas of one row, in so many turns (None: the kernel's).
    What stands there at the beginning is drawn by the first step, and shown as masks."""
    model = target.model
    if not isinstance(model, Noised):
        raise ValueError("strips are of models that denoise ids where they stand: d3pm or d3pm-pixels")
    kernel = in_turns(model.kernel, turns)
    states = [_standing(canvas, kernel.vocab)]
    for _ in decode(target, canvas, Denoise(kernel), random=Generator(seed)):
        states.append(_standing(canvas, kernel.vocab))
    return Strip(torch.stack(states)[moments(len(states) - 1, frames)], states[-1])


def _standing(canvas: Canvas, mask: int) -> Int[Tensor, "E"]:
    """What stands on the only row."""
    (kind,) = canvas.layout.kinds
    noise = canvas.noise.get(kind, torch.full_like(canvas.value[kind], mask))
    return torch.where(canvas.known, canvas.value[kind], noise)[0]


def save_picture_strips(
    strips: Mapping[str, Strip], side: int, levels: int, path: str | os.PathLike[str], upscale: int = 6
) -> Path:
    """Strips of pictures in `levels` grey levels, a row each by its name; masks are blue."""
    frames = {len(strip.states) for strip in strips.values()}
    if len(frames) != 1:
        raise ValueError(f"strips stand below each other, and have equally many moments; got {sorted(frames)}")
    images = []
    for strip, _ in strips.values():
        masked = (strip >= levels)[:, None]
        grey = 1 - strip.clamp(max=levels - 1)[:, None] * (2 / (levels - 1))  # ink on paper
        colour = torch.tensor(MASKED)[:, None].expand(len(strip), -1, strip.shape[1])
        images.append(torch.where(masked, colour, grey.expand(-1, 3, -1)).unflatten(2, (side, side)))
    return save_grid(torch.cat(images), path, columns=frames.pop(), row_labels=list(strips), upscale=upscale)


def save_text_strips(strips: Mapping[str, Strip], letters: Sequence[str | None], path: str | os.PathLike[str]) -> Path:
    """Strips of texts, a line a moment: what is as in the whole text is dark, other letters red, masks pale boxes.
    letters: of each id one letter (None: none that can be drawn); ids behind them are masks."""
    if len({len(strip.whole) for strip in strips.values()}) != 1:
        raise ValueError("strips of texts stand below each other, and are equally long")
    font = _monospaced()
    wide, high, gap = round(font.getlength("m")) + 1, LETTER + 5, 10
    left = round(max(font.getlength(name) for name in strips)) + 2 * gap
    length = len(next(iter(strips.values())).whole)
    height = sum(len(strip.states) * high + gap for strip in strips.values()) + gap
    sheet = Image.new("RGB", (left + length * wide + gap, height), "white")
    draw, y = ImageDraw.Draw(sheet), gap
    for name, (states, whole) in strips.items():
        draw.text((gap, y), name, fill=INK, font=font)
        for state in states:
            for i, (token, clean) in enumerate(zip(state.tolist(), whole.tolist(), strict=True)):
                place = (left + i * wide, y)
                if token >= len(letters):
                    draw.rectangle((*place, place[0] + wide - 2, y + high - 3), fill=PALE)
                else:
                    draw.text(place, letters[token] or "·", fill=INK if token == clean else ACCENT, font=font)
            y += high
        y += gap
    return write_beside(path, lambda file: sheet.save(file, format="PNG"))


def _monospaced() -> ImageFont.FreeTypeFont:
    """The monospaced font that matplotlib brings along."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono.ttf"), LETTER)
