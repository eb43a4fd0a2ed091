"""One HTML file that shows systems side by side: figures, curves, samples, films, and how to make them again.

Self-contained: pictures are data URIs, charts inline SVG, no script, and a policy in the page that forbids fetching
anything. Readable on a phone and in the dark. All text is escaped: samples and settings may hold anything.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from seriatim.evaluation.charts import Points, lines, scatter
from seriatim.evaluation.metrics import Bits
from seriatim.evaluation.pictures import write_beside

Figure = float | int | str | Bits | None
Picture = bytes | str | os.PathLike[str]
LARGE = 150_000  # bytes; larger pictures are stored as WebP where that is smaller
WIDEST = 1_200  # pixels
WIDE = 1000  # pixels, above which a picture has a row to itself
TYPES = {"PNG": "image/png", "GIF": "image/gif", "WEBP": "image/webp", "JPEG": "image/jpeg"}


@dataclass(frozen=True)
class Result:
    """What is known of one system on one data set.

    figures: name -> value, a row of the table; names in `FIGURES` get their title, unit and direction, others stand as
    they are; None: not measured. losses: name -> (step, loss). tradeoff: (forwards, quality) at several settings.
    grid, film: a PNG, GIF, WebP or JPEG, as bytes or a path. shows: what is on the grid. command: what makes this row
    again.
    """

    key: str
    title: str = ""
    figures: Mapping[str, Figure] = field(default_factory=dict)
    losses: Mapping[str, Points] = field(default_factory=dict)
    tradeoff: Points = ()
    grid: Picture | None = None
    shows: str = "samples"
    film: Picture | None = None
    texts: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    notes: Sequence[str] = ()

    @property
    def heading(self) -> str:
        """The key, and the title in small beside it: HTML, escaped."""
        return _text(self.key) + (f" <small>{_text(self.title)}</small>" if self.title else "")


# ---- figures ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Column:
    """How a known figure is shown. better: -1 lower, 1 higher, 0 neither."""

    title: str
    show: Callable[[float], str]
    better: int = 0


def _plain(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:,.{digits}f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def seconds_text(value: float) -> str:
    """0.8 ms, 1.25 s, 3 min 20 s, 2 h 5 min."""
    if value < 1:
        return f"{1000 * value:.3g} ms"
    if value < 120:
        return f"{value:.3g} s"
    minutes, left = divmod(round(value), 60)
    return f"{minutes} min {left} s" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60} min"


def count_text(value: float) -> str:
    """850, 45.1 k, 6.2 M, 1.1 G."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {letter}"
    return f"{value:g}"


def bytes_text(value: float) -> str:
    """312 MB, 1.24 GB (decimal)."""
    return f"{value / 1e9:.3g} GB" if value >= 1e9 else f"{value / 1e6:.3g} MB"


FIGURES: dict[str, Column] = {
    "bits_per_byte": Column("bits per byte", _plain(3), -1),
    "bits_per_dimension": Column("bits per dimension", _plain(3), -1),
    "fd_s": Column("FD-s", _plain(2), -1),
    "accuracy": Column("class accuracy", _percent, 1),
    "precision": Column("precision", _plain(3), 1),
    "recall": Column("recall", _plain(3), 1),
    "density": Column("density", _plain(3), 1),
    "coverage": Column("coverage", _plain(3), 1),
    "spread": Column("spread in class", _plain(3)),
    "nearest": Column("nearest training", _plain(2)),
    "distinct_share": Column("distinct tokens", _percent),
    "entropy": Column("token entropy, bits", _plain(2)),
    "lookback": Column("lookback", count_text),
    "mse": Column("MSE", _plain(3), -1),
    "mae": Column("MAE", _plain(3), -1),
    "mase": Column("MASE", _plain(3), -1),
    "smape": Column("sMAPE, %", _plain(1), -1),
    "interval_coverage": Column("inside intervals", _percent),
    "interval_width": Column("width of intervals", _plain(3)),
    "forwards": Column("forwards", count_text, -1),
    "slots": Column("slots", count_text, -1),
    "seconds": Column("time a sample", seconds_text, -1),
    "memory": Column("peak memory", bytes_text, -1),
    "parameters": Column("parameters", count_text),
    "training_seconds": Column("training", seconds_text),
}


def _table(results: Sequence[Result]) -> str:
    used = {name for r in results for name in r.figures}
    names = [n for n in FIGURES if n in used] + list(
        dict.fromkeys(n for r in results for n in r.figures if n not in FIGURES)
    )
    if not names:
        return ""
    columns = {n: FIGURES.get(n, Column(n.replace("_", " "), lambda v: f"{v:.4g}")) for n in names}
    mixed = [n for n in names if len({v.kind for r in results if isinstance(v := r.figures.get(n), Bits)}) > 1]
    best = {n: None if n in mixed else _best([r.figures.get(n) for r in results], columns[n].better) for n in names}
    arrows = {-1: "\u00a0↓", 0: "", 1: "\u00a0↑"}
    head = "".join(f'<th scope="col">{_text(c.title)}{arrows[c.better]}</th>' for c in columns.values())
    rows = []
    for r in results:
        cells = []
        for n, column in columns.items():
            value = r.figures.get(n)
            shown = _shown(value, column)
            mark = "best" if best[n] is not None and _number(value) == best[n] else "none" if shown == "–" else ""
            css = f' class="{mark}"' if mark else ""
            cells.append(f'<td data-name="{_text(column.title)}{arrows[column.better]}"{css}>{_text(shown)}</td>')
        rows.append(f'<tr><th scope="row">{r.heading}</th>{"".join(cells)}</tr>')
    says = "↓ lower is better, ↑ higher is better, the best is shaded; – not measured. Forwards and slots: of a sample."
    if mixed:
        titles = ", ".join(columns[n].title for n in mixed)
        says += (
            f" {titles}: ≤ marks an upper bound, which is not to be compared with exact values; none is called best."
        )
    return (
        f'<div class="scroll"><table><caption>{_text(says)}</caption><thead><tr><th scope="col">system</th>{head}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def grid(head: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> str:
    """A table of anything, for a section: the first column names the row. Escaped."""
    first, *others = head
    cells = "".join(f'<th scope="col">{_text(name)}</th>' for name in others)
    body = "".join(
        f'<tr><th scope="row">{_text(name)}</th>'
        + "".join(f'<td data-name="{_text(h)}">{_text(x)}</td>' for h, x in zip(others, row, strict=True))
        + "</tr>"
        for name, *row in rows
    )
    return (
        f'<div class="scroll"><table><caption>{_text(caption)}</caption><thead><tr><th scope="col">{_text(first)}</th>'
        f"{cells}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def cards(charts: Mapping[str, str]) -> str:
    """Charts side by side, for a section: SVG by its heading."""
    shown = "".join(
        f'<section class="card chart"><h3>{_text(heading)}</h3>{svg}</section>' for heading, svg in charts.items()
    )
    return f'<div class="cards">{shown}</div>'


def _number(value: Figure) -> float | None:
    """The value as a number, if it is one that can be compared."""
    if isinstance(value, Bits):
        value = value.value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _best(values: Sequence[Figure], better: int) -> float | None:
    numbers = [x for x in map(_number, values) if x is not None]
    if better == 0 or len(numbers) < 2 or min(numbers) == max(numbers):
        return None
    return max(numbers) if better > 0 else min(numbers)


def _shown(value: Figure, column: Column) -> str:
    if value is None:
        return "–"
    number = _number(value)
    if number is None:
        return str(value)
    return ("≤ " if isinstance(value, Bits) and value.kind == "bound" else "") + column.show(number)


# ---- pictures and texts ----------------------------------------------------------------------------------------------
def _image(picture: Picture, what: str) -> tuple[str, int]:
    """An <img> with the picture inside, and how wide it is."""
    data = picture if isinstance(picture, bytes) else Path(picture).read_bytes()
    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            kind, size = opened.format or "", opened.size
            if kind in TYPES and len(data) > LARGE:
                small = _webp(opened)
                if len(small[0]) < len(data):
                    data, kind, size = small[0], "WEBP", small[1]
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises for files cut short
        raise ValueError(f"{what}: not a picture that can be read ({error})") from None
    if kind not in TYPES:
        raise ValueError(f"{what}: {kind or 'unknown'} is not shown by browsers; want one of {', '.join(TYPES)}")
    source = f"data:{TYPES[kind]};base64,{base64.b64encode(data).decode('ascii')}"
    return f'<img src="{source}" alt="{_text(what)}" width="{size[0]}" height="{size[1]}">', size[0]


def _webp(opened: Image.Image) -> tuple[bytes, tuple[int, int]]:
    """All frames as WebP, at most WIDEST pixels wide, with their durations."""
    factor = min(1.0, WIDEST / opened.width)
    size = (max(1, round(opened.width * factor)), max(1, round(opened.height * factor)))
    frames, durations = [], []
    for i in range(getattr(opened, "n_frames", 1)):
        opened.seek(i)
        frames.append(opened.convert("RGB").resize(size, Image.Resampling.LANCZOS))
        durations.append(int(opened.info.get("duration", 100)))
    file = io.BytesIO()
    moving: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "duration": durations, "loop": 0}
    frames[0].save(file, format="WEBP", quality=85, method=4, **(moving if len(frames) > 1 else {}))
    return file.getvalue(), size


def _samples(results: Sequence[Result]) -> str:
    shown = []
    for r in results:
        parts, widest = [f"<h3>{r.heading}</h3>"], 0
        for picture, what in ((r.grid, r.shows), (r.film, "film of their making")):
            if picture is not None:
                image, width = _image(picture, f"{r.key}: {what}")
                widest = max(widest, width)
                parts.append(f"<figure>{image}<figcaption>{what}</figcaption></figure>")
        parts += [f"<pre>{_text(text)}</pre>" for text in r.texts]
        if len(parts) > 1:
            shown.append(f'<article class="card{" wide" if widest > WIDE else ""}">{"".join(parts)}</article>')
    return f'<h2>Samples</h2><div class="cards">{"".join(shown)}</div>' if shown else ""


def _charts(results: Sequence[Result], quality: str) -> str:
    losses = {r.key if len(r.losses) == 1 else f"{r.key} {name}": p for r in results for name, p in r.losses.items()}
    tradeoffs = {r.key: r.tradeoff for r in results if r.tradeoff}
    charts = {}
    if tradeoffs:
        charts[f"{quality} against forwards"] = scatter(tradeoffs, "forwards a sample", quality)
    if losses:
        charts["Loss while training"] = lines(losses, "step", "loss")
    return f"<h2>Curves</h2>{cards(charts)}" if charts else ""


def _recipes(results: Sequence[Result]) -> str:
    shown = []
    for r in results:
        notes = "".join(f"<li>{_text(note)}</li>" for note in r.notes)
        settings = "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in r.settings.items())
        parts = [
            f"<pre>{_text(r.command)}</pre>" if r.command else "",
            f'<ul class="notes">{notes}</ul>' if notes else "",
            f"<dl>{settings}</dl>" if settings else "",
        ]
        if any(parts):
            shown.append(f'<article class="card"><h3>{r.heading}</h3>{"".join(parts)}</article>')
    return f'<h2>How to make it again</h2><div class="cards">{"".join(shown)}</div>' if shown else ""


def _text(value: object) -> str:
    """Escaped for text and attributes; what HTML cannot hold (control characters, half surrogates) becomes U+FFFD."""
    kept = (
        c if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f" and not "\ud800" <= c <= "\udfff") else "\ufffd"
        for c in str(value)
    )
    return escape("".join(kept), quote=True)


# ---- the page --------------------------------------------------------------------------------------------------------
def write_report(
    path: str | os.PathLike[str],
    title: str,
    results: Sequence[Result],
    notes: Sequence[str] = (),
    quality: str = "quality",
    sections: Mapping[str, str] | None = None,
) -> Path:
    """Write the report; rows stand in the order given. `quality` names the second number of each `tradeoff`; sections:
    what else is to be shown before the samples, HTML (`charts`, `cards`, `grid`) by its heading.

    Raises ValueError for no results, two with one key, or a picture that is none; FileNotFoundError for a missing one.
    Nothing is written then, and an older report stays.
    """
    keys = [r.key for r in results]
    if not keys:
        raise ValueError("a report needs at least one result")
    if len(set(keys)) < len(keys):
        twice = sorted({k for k in keys if keys.count(k) > 1})
        raise ValueError(f"results need different keys, found twice: {', '.join(twice)}; add the setting that differs")
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; name the file, for example {Path(path) / 'report.html'}")
    style = resources.files("seriatim.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    said = "".join(f"<li>{_text(note)}</li>" for note in notes)
    page = "".join(
        [
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; ',
            "style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}</title>\n<style>\n{style}</style></head>\n<body><header><h1>{_text(title)}</h1>",
            f'<ul class="notes faint">{said}</ul>' if said else "",
            "</header>\n<main>",
            *(
                "\n" + part
                for part in (
                    _table(results),
                    _charts(results, quality),
                    *(f"<h2>{_text(heading)}</h2>{body}" for heading, body in (sections or {}).items()),
                    _samples(results),
                    _recipes(results),
                )
            ),
            "\n</main></body></html>\n",
        ]
    )
    return write_beside(path, lambda file: file.write(page.encode("utf-8")))
