"""Which rows stand where when some leave a batch and others join it, so that as few as can be move."""

from __future__ import annotations

from collections.abc import Sequence


def compacted(stays: Sequence[bool], new: int, first: int = 0, room: int | None = None) -> list[int]:
    """The rows of the next batch: for each the present row that stands there, -1 for a new one.

    stays: whether each present row goes on; new: how many join; first, room: where the present rows begin in a room of
    so many (None: of as many as are needed). The next batch is the run of places in the room that holds most of those
    that stay (the first of equals); only those outside of it move, into its gaps, and new rows take the gaps that are
    left (Flover, Yao et al. 2023: buffer reordering). Raises ValueError where they are more than there is room for.
    """
    live = sum(stays)
    many, room = live + new, max(first + len(stays), live + new) if room is None else room
    if many > room:
        raise ValueError(f"{many} rows do not fit into a room of {room}")
    there = [False] * first + [*stays] + [False] * (room - first - len(stays))
    inside = best = sum(there[:many])
    start = 0
    for end in range(many, room):
        inside += there[end] - there[end - many]
        if inside > best:
            best, start = inside, end - many + 1
    moving = [i - first for i in range(room) if there[i] and not start <= i < start + many]
    rows = []
    for place in range(start, start + many):
        rows.append(place - first if there[place] else moving.pop() if moving else -1)
    return rows


def moves(rows: Sequence[int]) -> int:
    """How many rows move when a batch becomes these: all that do not keep their distance to the others, as most do."""
    kept = [row - i for i, row in enumerate(rows) if row >= 0]
    return len(kept) - max((kept.count(shift) for shift in set(kept)), default=0)
