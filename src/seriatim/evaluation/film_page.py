"""A film of a text as one HTML file: played, stepped through, coloured by step, confidence or who decided.

Self-contained: style, script and frames stand in the page, and a policy in it forbids everything else, the network
first. What was generated enters as data and becomes text, never markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from seriatim.evaluation.pictures import write_beside
from seriatim.evaluation.text_film import Frame


def check_page(path: str | os.PathLike[str]) -> Path:
    """The place of a page that will be written; its folder is made. Raises ValueError, OSError where none can be."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the file, for example {path / 'film.html'}")
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"a film is a page: name it as {path}.html")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise type(error)(f"{path} cannot be written: {path.parent}: {error.strerror}") from None
    return path


def write_page(
    frames: Sequence[Frame], path: str | os.PathLike[str], title: str, about: Mapping[str, Any] | None = None
) -> Path:
    """Write the page that replays these frames; `about` stands below its title. Raises ValueError for no frames."""
    if not frames:
        raise ValueError("a film needs at least one frame: nothing was generated")
    film = {
        "title": title, "about": [[name, str(value)] for name, value in (about or {}).items()],
        "frames": changes(frames),
    }  # fmt: skip
    parts = {name: resources.files("seriatim.evaluation").joinpath(f"film.{name}").read_text("utf-8") for name in FILES}
    data = json.dumps(film, separators=(",", ":")).replace("<", "\\u003c")  # ends no element, begins no comment
    page = parts["html"].format(policy=_policy(parts), style=parts["css"], script=parts["js"], film=data)
    return write_beside(path, lambda file: file.write(page.encode("utf-8")))


FILES = ("html", "css", "js")


def changes(frames: Sequence[Frame]) -> list[list[Any]]:
    """Each frame as what it changes: [forwards, drafted, accepted, rejected, changed places, order of all or None]."""
    out: list[list[Any]] = []
    before: dict[int, Any] = {}
    order: list[int] = []
    for frame in frames:
        now = {place.element: place for place in frame.places}
        new = [p for e, p in now.items() if before.get(e) != p]
        places = [[p.element, p.text, p.by, None if p.chance is None else round(p.chance, 4), p.frame] for p in new]
        moved = list(now) != order
        before, order = now, list(now)
        counts = [frame.forwards, frame.drafted, frame.accepted, frame.rejected]
        out.append([*counts, places, order if moved else None])
    return out


def _policy(parts: Mapping[str, str]) -> str:
    """Nothing but this style and this script."""

    def known(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    allowed = f"script-src {known(parts['js'])}; style-src {known(parts['css'])}"
    return f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
