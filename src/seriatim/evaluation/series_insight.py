"""What a forecaster looks at, of one window: maps of attention, a forecast as a sum of parts, words that are near."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from seriatim.evaluation.pictures import PALE, write_beside
from seriatim.evaluation.series import COLOURS


@dataclass(frozen=True)
class Heat:
    """Maps side by side, by their titles: how much each row (named by `names`) attends to each column."""

    title: str
    maps: Mapping[str, Float[Tensor, "n n"]]
    names: Sequence[str]


@dataclass(frozen=True)
class Lines:
    """Curves under each other, by their names."""

    title: str
    curves: Mapping[str, Float[Tensor, " t"]]


@dataclass(frozen=True)
class Words:
    """Texts, by what they are near to."""

    title: str
    rows: Mapping[str, Sequence[str]]


Insight = Heat | Lines | Words


def save_insight(insight: Insight, path: Path) -> Path:
    """Write it, and where it stands: a picture at `path`.png, or words at `path`.txt."""
    if isinstance(insight, Words):
        text = "\n".join([insight.title, "", *(f"{k}: {', '.join(map(repr, v))}" for k, v in insight.rows.items()), ""])
        return write_beside(path.with_suffix(".txt"), lambda file: file.write(text.encode("utf-8")))
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heat = isinstance(insight, Heat)
    count = len(insight.maps if isinstance(insight, Heat) else insight.curves)
    size = (1.2 + 4.2 * count, 4.4) if heat else (9.0, 0.7 + 1.5 * count)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1 if heat else count, count if heat else 1, squeeze=False, sharex=not heat).flatten()
    if isinstance(insight, Heat):
        places = range(len(insight.names))
        for axes, (name, values) in zip(panels, insight.maps.items(), strict=True):
            shown = axes.imshow(values.float().cpu().numpy(), vmin=0.0, cmap="viridis")
            axes.set_title(name, fontsize=10)
            axes.set_xticks(places, insight.names, rotation=90, fontsize=7, parse_math=False)
            axes.set_yticks(places, insight.names, fontsize=7, parse_math=False)
            figure.colorbar(shown, ax=axes, shrink=0.7)
    else:
        for axes, (name, values), colour in zip(panels, insight.curves.items(), COLOURS * 3, strict=False):
            axes.plot(values.float().cpu().numpy(), color=colour, linewidth=1.3)
            axes.set_title(name, fontsize=9, loc="left")
            axes.grid(color=PALE)
            axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(insight.title, fontsize=11, parse_math=False)
    return write_beside(path.with_suffix(".png"), lambda file: figure.savefig(file, format="png", dpi=130))
