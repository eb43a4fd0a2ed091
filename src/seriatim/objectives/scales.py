"""Pyramids in training and sampling: which scales there are, and how much each of them counts."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from seriatim.maps import Shape

SPACING = 1.5  # of sizes beyond the trained ones, at most
KEPT = 0.05  # of the steps take the scales as they are
DROPPED = (0.1, 0.05, 0.02, 0.01)  # with these probabilities at least 1, 2, 3, 4 scales are left out


def drawn_scales(scales: Sequence[int], generator: torch.Generator) -> tuple[int, ...]:
    """Sides of a pyramid for one step of training, in the place of `scales` (FlexVAR, Jiao et al. 2025, its code).

    The first two and the last are kept, the others drawn anew: five sevenths of them from the sizes up to five eighths
    of the last, the rest from those beyond (of sixteen: five of 3 to 10 and two of 11 to 15). Now and then some are
    left out; and as long as there are more elements than `scales` have, one of the last four is, which may be the very
    last. Pyramids of fewer than four scales are left as they are. What is drawn grows and has no size twice.
    """
    most, last = sum(side * side for side in scales), scales[-1]
    if len(scales) < 4 or _chance(generator) < KEPT:
        return tuple(scales)
    low, high = list(range(scales[1] + 1, max(5 * last // 8, scales[1] + 1) + 1)), []
    high = list(range(low[-1] + 1, last))
    coarse = len(scales) - 3 - round((len(scales) - 3) * 2 / 7)
    found = [*scales[:2], *_some(low, coarse, generator), *_some(high, len(scales) - 3 - coarse, generator), last]
    x = _chance(generator)
    for share in DROPPED:
        if x < share and len(found) > 3:
            found.pop(2 + _below(len(found) - 3, generator))
    while sum(side * side for side in found) > most:
        found.pop(len(found) - 1 - _below(min(4, len(found) - 1), generator))
    return tuple(found)


def _some(of: Sequence[int], count: int, generator: torch.Generator) -> list[int]:
    order = torch.randperm(len(of), generator=generator, device=generator.device)[:count]
    return sorted(of[i] for i in order.tolist())


def _chance(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, device=generator.device))


def _below(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator, device=generator.device))


def scales_to(shape: Shape, scales: Sequence[int], steps: int | None = None) -> tuple[Shape, ...]:
    """Shapes of a pyramid that ends in maps of `shape`, for a model that knows `scales`.

    `steps` of them, as evenly among the known sizes as these are spaced (None: those that are known). A map that is
    larger than the last known one follows behind it, by steps of at most half as much again. Maps of other forms than
    squares grow in their own proportions, from the first scale as it is known. Raises ValueError where there are not so
    many sizes.
    """
    largest, known = max(shape), scales[-1]
    sides = [side for side in scales if side < min(largest, known)] + [min(largest, known)]
    while sides[-1] < largest:
        sides.append(min(largest, math.ceil(sides[-1] * SPACING)))
    if steps is not None:
        sides = _spread(sides, steps)
    first = (min(sides[0], shape[0]), min(sides[0], shape[1]))
    shapes = [first, *(_proportioned(side, shape) for side in sides[1:])]
    return tuple(one for one, _ in itertools.groupby(shapes))


def _proportioned(side: int, shape: Shape) -> Shape:
    rows, columns = (max(1, (2 * n * side + max(shape)) // (2 * max(shape))) for n in shape)
    return rows, columns


def _spread(sides: Sequence[int], count: int) -> list[int]:
    """So many sizes that grow, from the first to the last of these, spaced as they are."""
    first, last = sides[0], sides[-1]
    if not 1 <= count <= last - first + 1:
        raise ValueError(f"from {first} to {last} there are 1 to {last - first + 1} sizes of maps, not {count}")
    if count == 1:
        return [last]
    at = [i * (len(sides) - 1) / (count - 1) for i in range(count)]
    below = [min(int(x), len(sides) - 2) if len(sides) > 1 else 0 for x in at]
    smooth = [
        sides[i] + (x - i) * (sides[i + 1] - sides[i]) if len(sides) > 1 else sides[0]
        for x, i in zip(at, below, strict=True)
    ]
    out = [math.floor(x + 0.5) for x in smooth]
    for i in range(1, count):  # grow by one at least, ...
        out[i] = max(out[i], out[i - 1] + 1)
    out[-1] = last
    for i in range(count - 2, -1, -1):  # ... and leave room for what follows
        out[i] = min(out[i], out[i + 1] - 1)
    return out


def scale_weights(scales: Sequence[int]) -> tuple[float, ...]:
    """How much each scale counts in the loss, together 1 (HMAR, Kumbong et al. 2025): the normal density at the z-score
    of the side in its place from the other end. Scales in the middle count most; the mean over elements, which VAR
    takes, gives the last of ten 38%."""
    if len(scales) < 2:
        return (1.0,) * len(scales)
    mean, deviation = statistics.fmean(scales), statistics.stdev(scales)
    if deviation == 0:
        return (1 / len(scales),) * len(scales)
    density = [math.exp(-(((side - mean) / deviation) ** 2) / 2) for side in reversed(scales)]
    return tuple(d / sum(density) for d in density)


def element_weights(scales: Sequence[int]) -> Float[Tensor, "E"]:
    """The same for each element: those of a scale share its weight evenly."""
    parts = zip(scales, scale_weights(scales), strict=True)
    return torch.cat([torch.full((side * side,), weight / side**2) for side, weight in parts])
