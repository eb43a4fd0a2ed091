"""Speculative Jacobi decoding: the model drafts for itself in a window that slides over the picture, or the text.

New: tokens are drawn, not the likeliest ones, and yet fixed several at a time. Every forward reads a whole window; from
the left each token is accepted with probability min(1, p / q), where q is the row that it was drawn from and p its new
one; the first that is not is replaced by a draw from norm(max(0, p - q)), and all behind it are drawn afresh from their
new rows, which are recorded as their q (Teng et al. 2024). That is exact whatever enters the window; what enters only
makes it faster. At temperature 0 it is Jacobi decoding.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch

from seriatim.decoding.jacobi import Window
from seriatim.decoding.verify import Chain, GreedyMatch
from seriatim.laws.decoders import DecoderCase
from seriatim.systems.claim import Claim, Trial
from seriatim.systems.decoder.spec_sampling import FromTarget
from seriatim.systems.decoders import Ask, Decoding
from seriatim.systems.meta import Meta

META = Meta(
    key="sjd",
    title="Speculative Jacobi decoding",
    family="decoder",
    modality="image",
    paper="Accelerating Auto-regressive Text-to-Image Generation with Training-free Speculative Jacobi Decoding "
    "(2024), arXiv 2410.01699",
    likelihood="lossless",
    summary="The model drafts for itself in a sliding window, verified by the ratio of its new and old rows.",
)
INITIALISERS = ("random", "horizontal", "vertical")


@dataclass(frozen=True)
class Options:
    """window: tokens that are drafted at once; initialiser: what enters it, a "random" id, the left neighbour again
    ("horizontal"), or the upper one ("vertical", in pictures)."""

    window: int = 16
    initialiser: str = "horizontal"


def decoder(ask: Ask) -> Decoding:
    """A window, verified by the ratio; at temperature 0 a token stands if it is the likeliest."""
    ask.no_source()
    greedy = ask.sampling.temperature == 0
    return Decoding(GreedyMatch(ask.stop) if greedy else Chain(ask.stop), window(ask))


def window(ask: Ask, kind: type[Window] = Window) -> Window:
    """The window that is asked for. Raises ValueError for another initialiser, and one that needs rows where there are
    none."""
    o = ask.options
    size = ask.fits("window", o.window)
    if o.initialiser not in INITIALISERS:
        raise ValueError(f"initialiser is {', '.join(INITIALISERS)}, not {o.initialiser!r}")
    if o.initialiser == "vertical":
        return kind(size, stride=columns(ask.system))
    return kind(size, "random" if o.initialiser == "random" else "repeat")


def columns(system: Any) -> int:
    """How many elements a row of pictures has. Raises ValueError for what is no picture."""
    place = system.model.layout.coord
    if place.shape[1] != 2:
        raise ValueError("the vertical initialiser repeats what stands above, and only pictures have an above")
    return int(place[:, 1].max()) + 1


def _forwards(decoder: str, labels: int = 20) -> Trial:
    """The mean forwards of a picture, drawn one at a time with the system's own sampling."""

    def measure(system: Any, seed: int) -> dict[str, float]:
        wanted = torch.linspace(0, system.config.classes - 1, labels).long()
        counts = [
            system.draw(label[None], seed=labels * seed + n, decoder=decoder).forwards for n, label in enumerate(wanted)
        ]
        return {"forwards": statistics.fmean(counts)}

    return Trial("zoo:raster-ar", measure)


CLAIM = Claim(
    text="A picture takes less than two thirds of the forwards, whose law stays what it was.",
    paper="2,392 to 1,035 forwards a picture (Lumina-mGPT)",
    metric="forwards",
    arms={
        "window 8": _forwards("sjd+window=8"),
        "ancestral": _forwards("ancestral"),
        "window 16": _forwards("sjd+window=16"),
        "vertical": _forwards("sjd+window=8+initialiser=vertical"),
        "random": _forwards("sjd+window=8+initialiser=random"),
    },
    ours="window 8",
    baseline="ancestral",
    better="lower",
    margin=1.5,
)


def case() -> DecoderCase:
    """For the laws."""
    return DecoderCase(decoder, Options(window=2), coupled=False)


def mutant() -> DecoderCase:
    """After a rejection a token of the target, not of what is left of it."""
    return DecoderCase(lambda ask: Decoding(FromTarget(ask.stop), window(ask)), Options(window=2), coupled=False)
