"""The gallery: in which order each system draws a picture, made when the site is built by watching it draw one."""

from __future__ import annotations

from functools import cache
from typing import Any

from seriatim.systems.meta import catalogue

LEVELS = {
    "pixel": "Pixels: the picture itself is written.",
    "token": "Tokens: the ids or vectors of one map.",
    "scale": "Scales: maps of several sizes, coarse to fine.",
}
MARK = "<!-- gallery of orders -->"


@cache
def orders() -> tuple[Any, ...]:
    """What was watched of every system of pictures, fewest forwards first."""
    from seriatim.systems.image_orders import watched

    keys = [key for key, (meta, _) in catalogue().items() if meta.family == "image"]
    return tuple(sorted(map(watched, keys), key=lambda order: (order.forwards, order.key)))


def gallery() -> str:
    """The table and the animations as Markdown."""
    parts = [_table()]
    for level, said in LEVELS.items():
        parts += [f"## {said.partition(':')[0]}", said]
        for order in orders():
            if order.level == level:
                parts += [f"### [{order.title}](systems/{order.key}.md)", f"![{order.title}](gallery/{order.key}.svg)"]
    return "\n\n".join(parts) + "\n"


def _table() -> str:
    lines = ["| system | made of | element | elements | forwards | decided together | likelihood |", "|---" * 7 + "|"]
    for o in orders():
        least, most = o.groups
        together = str(most) if least == most else f"{least} to {most}"
        cells = (
            f"[`{o.key}`](systems/{o.key}.md)",
            o.level,
            o.element,
            len(o.turn),
            o.forwards,
            together,
            o.likelihood,
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def on_files(files: Any, config: Any) -> Any:
    """Add the animations."""
    from mkdocs.structure.files import File

    from seriatim.systems.image_orders import animated

    for order in orders():
        files.append(File.generated(config, f"gallery/{order.key}.svg", content=animated(order)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put the gallery where a page asks for it."""
    return markdown.replace(MARK, gallery()) if MARK in markdown else markdown
