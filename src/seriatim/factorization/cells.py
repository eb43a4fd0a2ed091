"""A grid cut into groups of equal size that are decided one after another: which group each element belongs to.

Elements are numbered in raster order, and so are groups. Every partition has its two ends: groups of one element are
raster order, one group is the whole grid at once.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor


def cells(rows: int, columns: int, height: int, width: int) -> Int[Tensor, "E"]:
    """Neighbours: cells of `height` x `width` elements that tile the grid (xAR's cells, the blocks of ACDiT)."""
    _check(rows, columns, height, width)
    row, column = torch.arange(rows)[:, None] // height, torch.arange(columns) // width
    return (row * (columns // width) + column).flatten()


def subsample(rows: int, columns: int, height: int, width: int) -> Int[Tensor, "E"]:
    """The opposite: groups of `height` x `width` elements that are spread evenly over the grid, as far from each other
    as they can be."""
    _check(rows, columns, height, width)
    down, right = rows // height, columns // width  # from an element to the next of its group
    row, column = torch.arange(rows)[:, None] % down, torch.arange(columns) % right
    return (row * right + column).flatten()


def _check(rows: int, columns: int, height: int, width: int) -> None:
    if min(rows, columns, height, width) < 1 or rows % height or columns % width:
        raise ValueError(f"groups of {height} x {width} elements do not tile a grid of {rows} x {columns}")
