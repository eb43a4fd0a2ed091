"""Draws the pictures of README and documentation: `python docs/pictures.py [KEY=RUN ...]`.

Of the runs that are named (`var=runs/demo`) it takes samples and film, which the page of the system then shows.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

import seriatim as s
from seriatim.data import load_data
from seriatim.evaluation.pictures import INK, PALE, draw_mask, save_grid, write_beside

IMAGES = Path(__file__).parent / "images"


def masks() -> None:
    """Two orders as masks: the first is a language model's, the second VAR's."""
    text = s.inclusive(range(21))
    draw_mask(text.mask()[0], IMAGES / "mask-next-token.png", title="next token: at = born = position")
    scale = s.pyramid([1, 2, 4]).coord[:, 0]
    sides = [1, 4, 16]
    names = ["1x1", "2x2", "4x4"]
    draw_mask(
        s.inclusive(scale).mask()[0],
        IMAGES / "mask-next-scale.png",
        title="next scale: at = born = scale",
        row_groups=sides,
        column_groups=sides,
        row_labels=names,
        column_labels=names,
    )
    block = torch.arange(8) // 2
    both = torch.cat([block, block])
    draw_mask(
        s.two_stream(both, torch.arange(16) < 8).mask()[0],
        IMAGES / "mask-block-diffusion.png",
        title="block diffusion: queries, then values",
        row_groups=[2] * 8,
        column_groups=[2] * 8,
    )


def patterns() -> None:
    """The visibility constructors side by side: rows are queries, columns keys."""
    scale = s.pyramid([1, 2, 3]).coord[:, 0]
    block = torch.arange(8) // 2
    both, query = torch.cat([block, block]), torch.arange(16) < 8
    views = {
        "inclusive(position)\nnext token": s.inclusive(range(14)),
        "inclusive(scale)\nnext scale": s.inclusive(scale),
        "own_rank(scale)\neach scale by itself": s.own_rank(scale),
        "two_stream(block, query)\nblocks: masks, then values": s.two_stream(both, query),
        "tree(parent)\na tree of drafts": s.tree([-1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 7]),
        "full(n)\nmasked generation": s.full(14),
    }
    figure = Figure(figsize=(9, 6.6), layout="constrained")
    for axes, (title, view) in zip(figure.subplots(2, 3).flat, views.items(), strict=True):
        seen = view.mask()
        full = torch.ones(14, 14, dtype=torch.bool)
        picture = seen[0] if isinstance(seen, Tensor) else full.tril() if seen == "causal" else full
        axes.imshow(picture.numpy(), cmap=ListedColormap([PALE, INK]), vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    write_beside(IMAGES / "patterns.png", lambda file: figure.savefig(file, format="png", dpi=110))


def orders() -> None:
    """Orders of the elements of a grid: the step that decides each."""
    layout = s.grid(4, 4)
    row, column = layout.coord.unbind(1)
    quarter = 2 * (row % 2) + column % 2
    coarse = (quarter == 0).cumsum(0) - 1
    steps = {
        "Line: raster": torch.arange(16),
        "Blocks(4)": s.Blocks(4).order(layout)[0],
        "diagonals": row + column,
        "interlaced": torch.where(quarter == 0, coarse, 3 + quarter),
        "AnyOrder, four a step": torch.randperm(16, generator=torch.Generator().manual_seed(1)) // 4,
    }
    pale_to_ink = LinearSegmentedColormap.from_list("steps", [PALE, INK])
    figure = Figure(figsize=(10, 2.5), layout="constrained")
    for axes, (title, rank) in zip(figure.subplots(1, 5), steps.items(), strict=True):
        square, last = rank.view(4, 4), int(rank.max())
        axes.imshow(square.numpy(), cmap=pale_to_ink, vmin=0, vmax=last)
        for i, j in layout.coord.tolist():
            value = int(square[i, j])
            axes.text(j, i, value, ha="center", va="center", color="white" if value > 0.45 * last else INK)
        axes.set_title(f"{title}\n{last + 1} steps", fontsize=10)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    write_beside(IMAGES / "orders.png", lambda file: figure.savefig(file, format="png", dpi=110))


def data_sets() -> None:
    """A look at the glyphs and lines as training sees them: augmented, in all fonts."""
    random = torch.Generator().manual_seed(0)
    glyphs, lines = load_data("glyphs", "image"), load_data("lines", "image", line_width=256)
    shown = torch.randperm(len(glyphs.train), generator=random)[:120]
    save_grid(glyphs.train.take(shown, random)["image"], IMAGES / "glyphs.png", columns=20, upscale=1, invert=True)
    shown = torch.randperm(len(lines.train), generator=random)[:15]
    save_grid(lines.train.take(shown, random)["image"], IMAGES / "lines.png", columns=3, upscale=1, invert=True)


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    masks()
    patterns()
    orders()
    data_sets()
    for word in sys.argv[1:]:
        key, _, run = word.partition("=")
        for name in ("samples.png", "film.gif"):
            shutil.copy(Path(run) / name, IMAGES / f"{key}-{name}")


if __name__ == "__main__":
    main()
