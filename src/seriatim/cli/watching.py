"""A text on the terminal while it is decided, in whatever order: places appear where they belong, colours say when."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.style import Style
from rich.text import Text

from seriatim.evaluation.text_film import Frame, Place, Recorder

FRAMES_PER_SECOND = 8  # drawn, whether or not a step was taken
# From the first tokens to the last, readable on white and on black.
COLOURS = tuple(Style.parse(c) for c in ("#4f7fd6", "#2f93b5", "#2f9a76", "#6f9a2f", "#a98a1f", "#c9772f", "#d0605a"))
OPEN, NEW, PLAIN, FAINT = Style(dim=True), Style(bold=True, reverse=True), Style(), Style(dim=True)
NARROW = 24  # columns, below which there is no room for figures


def shows(console: Console) -> bool:
    """Is this a terminal on which lines can be drawn again?"""
    return console.is_terminal and not console.is_dumb_terminal


class Screen:
    """Draws the newest frame of a recorder over the one before, until it is closed; then nothing of it is left. Where
    the work is broken off, the last frame stays."""

    def __init__(self, console: Console, recorder: Recorder):
        self.console, self.recorder = console, recorder
        self.start = time.monotonic()
        self.live = Live(
            console=console, get_renderable=self.scene, refresh_per_second=FRAMES_PER_SECOND, transient=True,
            vertical_overflow="crop",
        )  # fmt: skip

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.live.transient = kind is None
        self.live.stop()

    def scene(self) -> RenderableType:
        """What is to be seen now: the text, or as many of its lines as there is room for, and what it cost so far."""
        frames = self.recorder.frames
        if not frames:
            return Text("")
        count, frame = len(frames) - 1, frames[-1]
        console = self.console
        text = painted(frame, count, "." if console.options.ascii_only else "·")
        lines = list(text.wrap(console, console.width, tab_size=4, overflow="fold"))
        shown = _window(lines, max(console.height - 2, 1))
        return Group(*shown, _figures(frame, time.monotonic() - self.start, console))


def painted(frame: Frame, newest: int = 0, mark: str = "·") -> Text:
    """A frame as coloured text: what was given plain, unknown places as dim marks, what was decided in frame `newest`
    reversed, the rest by when it was decided."""
    out, decided = Text(), sorted(p.frame for p in frame.places if p.by in ("model", "draft"))
    colour = {number: COLOURS[len(COLOURS) * i // len(decided)] for i, number in reversed(list(enumerate(decided)))}
    run, style = "", PLAIN
    for place in frame.places:
        now = _style(place, newest, colour)
        if now is not style:
            out.append(run, style)
            run, style = "", now
        run += mark if place.text is None else visible(place.text)
    return out.append(run, style)


def _style(place: Place, newest: int, colour: dict[int, Style]) -> Style:
    if place.by in ("given", "open"):
        return PLAIN if place.by == "given" else OPEN
    return NEW if newest and place.frame == newest else colour[place.frame]


CONTROLS = {n: 0x2400 + n for n in range(32)} | {127: 0x2421} | {n: 0xFFFD for n in range(128, 160)}
CONTROLS = {n: sign for n, sign in CONTROLS.items() if chr(n) not in "\n\t"}


def visible(text: str) -> str:
    """The text without what would steer a terminal: control characters as their pictures."""
    return text.translate(CONTROLS)


def _window(lines: Sequence[Text], room: int) -> Sequence[Text]:
    """So many lines, around the first that has something new."""
    if len(lines) <= room:
        return lines
    new = next((i for i, line in enumerate(lines) if any(span.style is NEW for span in line.spans)), len(lines))
    start = min(max(new - room // 2, 0), len(lines) - room)
    return lines[start : start + room]


def _figures(frame: Frame, seconds: float, console: Console) -> Text:
    """One line: forwards, tokens, tokens a forward, seconds."""
    open_ = sum(place.by == "open" for place in frame.places)
    parts = [f"{frame.decided} of {frame.decided + open_} tokens" if open_ else f"{frame.decided} tokens"]
    if console.width >= NARROW:
        parts += [f"{frame.forwards} forwards"]
    if frame.forwards and console.width >= 2 * NARROW:
        parts += [f"{frame.decided / frame.forwards:.1f} a forward"]
    return Text(", ".join([*parts, f"{seconds:.0f} s"]), style=FAINT, no_wrap=True, overflow="crop", end="")
