"""Pictures for people: grids of samples, films of their making, loss curves and attention masks.

Every file is written beside its place and then renamed, so that a reader never finds half of one. Pictures are tensors
(n, c, h, w) in [-1, 1] with one or three channels; anything else raises ValueError before a file is touched.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER = 255  # grey of margins and gaps
INK = "#1f3a5f"  # the one dark colour of curves and masks
PALE = "#eef1f5"
ACCENT = "#c8553d"
CAPTION_HEIGHT, LABEL_MARGIN = 22, 5  # pixels
LINE_INCHES, LETTER_INCHES = 0.14, 0.085  # of tick labels
RESAMPLING = {"nearest": Image.Resampling.NEAREST, "bicubic": Image.Resampling.BICUBIC}
Resample = Literal["nearest", "bicubic"]


# ---- grids and films -------------------------------------------------------------------------------------------------
def save_grid(
    images: Float[Tensor, "n c h w"],
    path: str | os.PathLike[str],
    *,
    columns: int = 10,
    row_labels: Sequence[str] | None = None,
    upscale: int = 8,
    resample: Resample = "nearest",
    invert: bool = False,
) -> Path:
    """Save pictures as one PNG, row by row, each `upscale` times larger; `row_labels` stand left of the rows.

    `invert` shows -1 as white and 1 as black: ink on paper.
    """
    sheet = _sheet(images, columns, row_labels, upscale, resample, invert)
    return write_beside(path, lambda file: sheet.save(file, format="PNG"))


def save_film(
    steps: Sequence[Float[Tensor, "n c h w"]],
    path: str | os.PathLike[str],
    *,
    captions: Sequence[str] | None = None,
    columns: int = 10,
    row_labels: Sequence[str] | None = None,
    upscale: int = 8,
    resample: Resample = "nearest",
    invert: bool = False,
    pause: float = 0.8,
    final_pause: float = 2.5,
) -> Path:
    """Save a GIF that shows the same pictures after each step of their making, for example scale by scale, for ever.

    Each entry of `steps` is a grid of equal shape; it stays for `pause` seconds, the last for `final_pause`. A caption
    for each step stands below the grid.
    """
    if not steps:
        raise ValueError("a film needs at least one step")
    if any(s.shape != steps[0].shape for s in steps):
        raise ValueError(f"all steps of a film have one shape, got {[tuple(s.shape) for s in steps]}")
    if captions is not None and len(captions) != len(steps):
        raise ValueError(f"one caption a step: {len(captions)} captions for {len(steps)} steps")
    frames = [_sheet(step, columns, row_labels, upscale, resample, invert) for step in steps]
    if captions is not None:
        frames = [_captioned(frame, caption) for frame, caption in zip(frames, captions, strict=True)]
    milliseconds = [round(1000 * pause)] * (len(frames) - 1) + [round(1000 * final_pause)]

    def save(file: BinaryIO) -> None:
        frames[0].save(
            file, format="GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, disposal=1
        )

    return write_beside(path, save)


def _sheet(
    images: Tensor,
    columns: int,
    row_labels: Sequence[str] | None,
    upscale: int,
    resample: Resample,
    invert: bool,
) -> Image.Image:
    _check_images(images)
    if columns < 1 or upscale < 1 or resample not in RESAMPLING:
        raise ValueError(f"columns={columns} and upscale={upscale} start at 1; resample is one of {list(RESAMPLING)}")
    n, channels, height, width = images.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    if row_labels is not None and len(row_labels) != rows:
        raise ValueError(f"one label a row: {len(row_labels)} labels for {rows} rows")
    height, width, gap = height * upscale, width * upscale, max(2, upscale)
    font = ImageFont.load_default(size=max(11, min(20, height // 3)))
    left = gap + max((round(font.getlength(label)) + 3 * LABEL_MARGIN for label in row_labels or ()), default=0)
    mode, paper = ("L", PAPER) if channels == 1 else ("RGB", (PAPER,) * 3)
    sheet = Image.new(mode, (left + columns * (width + gap), gap + rows * (height + gap)), paper)
    pixels = (images.detach().cpu().float().clamp(-1, 1) + 1) * 127.5
    pixels = (255 - pixels if invert else pixels).round().to(torch.uint8)
    for i, picture in enumerate(pixels):
        array = picture[0] if channels == 1 else picture.permute(1, 2, 0)
        tile = Image.fromarray(array.contiguous().numpy()).resize((width, height), RESAMPLING[resample])
        sheet.paste(tile, (left + i % columns * (width + gap), gap + i // columns * (height + gap)))
    draw = ImageDraw.Draw(sheet)
    for row, label in enumerate(row_labels or ()):
        middle = gap + row * (height + gap) + height / 2
        draw.text((left - 2 * LABEL_MARGIN, middle), label, fill="black", font=font, anchor="rm")
    return sheet


def _captioned(sheet: Image.Image, caption: str) -> Image.Image:
    framed = Image.new(sheet.mode, (sheet.width, sheet.height + CAPTION_HEIGHT), "white")
    framed.paste(sheet)
    place = (sheet.width / 2, sheet.height + CAPTION_HEIGHT / 2 - 2)
    ImageDraw.Draw(framed).text(place, caption, fill="black", font=ImageFont.load_default(size=13), anchor="mm")
    return framed


# ---- curves and masks ------------------------------------------------------------------------------------------------
def save_curve(
    history: Mapping[str, Sequence[float]],
    path: str | os.PathLike[str],
    *,
    title: str = "",
    x_label: str = "step",
    y_label: str = "loss",
    every: int = 1,
    smooth: int = 1,
    log: bool = False,
) -> Path:
    """Save one curve for each name in `history`, whose values were taken at steps every, 2 * every, ...

    With `smooth` > 1 a running mean over so many values is drawn over the pale raw ones.
    """
    if not history or any(len(values) == 0 for values in history.values()):
        raise ValueError("a curve needs at least one named series, and none of them empty")
    if every < 1 or smooth < 1:
        raise ValueError(f"every={every} and smooth={smooth} start at 1")
    figure, axes = _figure(6.4, 3.6)
    for (name, values), colour in zip(history.items(), _colours(len(history)), strict=True):
        series = torch.as_tensor(values, dtype=torch.float64)
        if not series.isfinite().all():
            raise ValueError(f"{name!r} is not finite at step {every * (int((~series.isfinite()).nonzero()[0]) + 1)}")
        steps, width = every * torch.arange(1, len(series) + 1), min(smooth, len(series))
        if width > 1:
            axes.plot(steps.numpy(), series.numpy(), color=colour, alpha=0.2, linewidth=0.8)
            series = series.unfold(0, width, 1).mean(dim=1)
            steps = steps[width // 2 : width // 2 + len(series)]
        axes.plot(steps.numpy(), series.numpy(), color=colour, linewidth=1.6, label=name)
    axes.set(title=title, xlabel=x_label, ylabel=y_label, yscale="log" if log else "linear")
    axes.grid(color=PALE)
    axes.spines[["top", "right"]].set_visible(False)
    if len(history) > 1:
        axes.legend(frameon=False)
    return write_beside(path, lambda file: figure.savefig(file, format="png", dpi=150))


def draw_mask(
    mask: Bool[Tensor, "q k"],
    path: str | os.PathLike[str],
    *,
    title: str = "",
    row_groups: Sequence[int] | None = None,
    column_groups: Sequence[int] | None = None,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
) -> Path:
    """Save an attention mask as a picture: rows are queries, columns are keys, dark where a query sees a key.

    `row_groups` and `column_groups` are the sizes of consecutive groups (scales, blocks); lines part them. Labels are
    one for each group, or one for each row or column where no groups are given.
    """
    if mask.dim() != 2 or mask.dtype != torch.bool or mask.numel() == 0:
        raise ValueError(f"a mask is a bool tensor (queries, keys), got {mask.dtype} {tuple(mask.shape)}")
    from matplotlib.colors import ListedColormap

    queries, keys = mask.shape
    row_ends = _group_ends(row_groups, row_labels, queries, "row")
    column_ends = _group_ends(column_groups, column_labels, keys, "column")
    cell = min(0.4, 5.6 / max(queries, keys))  # inches
    figure, axes = _figure(1.2 + cell * keys, 1.2 + cell * queries)
    axes.imshow(mask.cpu().numpy(), cmap=ListedColormap([PALE, INK]), vmin=0, vmax=1, interpolation="nearest")
    if max(queries, keys) <= 64:
        axes.hlines([i - 0.5 for i in range(1, queries)], -0.5, keys - 0.5, color="white", linewidth=0.4)
        axes.vlines([i - 0.5 for i in range(1, keys)], -0.5, queries - 0.5, color="white", linewidth=0.4)
    if row_groups is not None:
        axes.hlines([end - 0.5 for end in row_ends[1:-1]], -0.5, keys - 0.5, color=ACCENT, linewidth=1.1)
    if column_groups is not None:
        axes.vlines([end - 0.5 for end in column_ends[1:-1]], -0.5, queries - 0.5, color=ACCENT, linewidth=1.1)
    places, labels = _readable(row_ends, row_labels or (), lambda label: LINE_INCHES / cell)
    axes.set_yticks(places, labels)
    places, labels = _readable(column_ends, column_labels or (), lambda label: LETTER_INCHES * (len(label) + 1) / cell)
    upright = len(labels) < len(column_labels or ())
    if upright:
        places, labels = _readable(column_ends, column_labels or (), lambda label: LINE_INCHES / cell)
    axes.set_xticks(places, labels, rotation=90 if upright else 0)
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="keys", ylabel="queries")
    axes.set_title(title, fontsize=11)
    return write_beside(path, lambda file: figure.savefig(file, format="png", dpi=150, bbox_inches="tight"))


def _group_ends(groups: Sequence[int] | None, labels: Sequence[str] | None, size: int, what: str) -> list[int]:
    """0 and the end of each group; every row or column is a group of its own where none are given."""
    sizes = [1] * size if groups is None else list(groups)
    if min(sizes, default=0) < 1 or sum(sizes) != size:
        raise ValueError(f"{what} groups are at least 1 and sum to {size}, got {sizes}")
    if labels is not None and len(labels) != len(sizes):
        raise ValueError(f"one label a {what} or group: {len(labels)} labels for {len(sizes)}")
    ends = [0]
    for group in sizes:
        ends.append(ends[-1] + group)
    return ends


def _readable(
    ends: Sequence[int], labels: Sequence[str], room: Callable[[str], float]
) -> tuple[list[float], list[str]]:
    """Places and labels of groups, without those that would overlap a later one; `room` is in rows or columns."""
    places: list[float] = []
    kept: list[str] = []
    for i in reversed(range(len(labels))):
        middle = (ends[i] + ends[i + 1] - 1) / 2
        if not kept or places[0] - middle >= (room(labels[i]) + room(kept[0])) / 2:
            places, kept = [middle, *places], [labels[i], *kept]
    return places, kept


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure drawn by Agg, without pyplot: no window, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _colours(count: int) -> list[str]:
    palette = [INK, ACCENT, "#5b8e7d", "#e0a030", "#7a5c99", "#6b6b6b"]
    return [palette[i % len(palette)] for i in range(count)]


# ---- edges -----------------------------------------------------------------------------------------------------------
def _check_images(images: Tensor) -> None:
    if images.dim() != 4 or images.shape[1] not in (1, 3) or images.numel() == 0:
        raise ValueError(f"pictures are (n, 1 or 3, h, w), got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"pictures are floating point in [-1, 1], got {images.dtype}")
    if not images.isfinite().all():
        raise ValueError(
            f"{int((~images.isfinite()).flatten(1).any(1).sum())} of {len(images)} pictures hold NaN or inf"
        )
    if images.abs().max() > 1 + 1e-3:
        low, high = images.min().item(), images.max().item()
        raise ValueError(f"pictures lie in [-1, 1], these in [{low:.3g}, {high:.3g}]: rescale or clamp them first")


def write_beside(path: str | os.PathLike[str], save: Callable[[BinaryIO], object]) -> Path:
    """Write through a temporary file in the same folder, then rename it: a failure leaves what was there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            save(file)  # type: ignore[arg-type]
        except BaseException:
            os.unlink(file.name)
            raise
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    return path
