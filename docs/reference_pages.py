"""The reference: every public name of `seriatim`, a page a topic; the list of decisions; colours of code. A hook of
mkdocs.

The names are those that `seriatim/__init__.py` gives; their docstrings and signatures are read by mkdocstrings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import seriatim

# Folder of the package -> what its page is called; what lies in no folder is the core.
TOPICS = {
    "core": "Elements, visibility, plans",
    "factorization": "Orders",
    "backbones": "Networks",
    "heads": "Heads and distributions",
    "conditions": "Conditions",
    "decoding": "Decoding",
    "training": "Training",
    "systems": "Systems",
    "data": "Data",
    "verbs": "What a user does",
}


def topics() -> dict[str, list[str]]:
    """Topic -> full names of what is public there. Raises KeyError for a folder that has no title yet."""
    found: dict[str, list[str]] = {topic: [] for topic in TOPICS}
    for module, names in seriatim._WHERE.items():
        topic = module.split(".")[0] if "." in module else "core"
        found[topic] += [f"seriatim.{module}.{name}" for name in names]
    return {topic: names for topic, names in found.items() if names}


def page(topic: str, names: list[str]) -> str:
    """The page of a topic: each name is a heading, below it what mkdocstrings finds."""
    parts = [f"# {TOPICS[topic]}", "Each of these is a name of the package: `from seriatim import ...`."]
    return "\n\n".join([*parts, *(f"::: {name}" for name in names)]) + "\n"


def decisions(folder: Path) -> list[dict[str, str]]:
    """The notes of a folder by their first headings, for the navigation."""
    notes = sorted(folder.glob("decisions/*.md"))
    return [{n.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# "): f"decisions/{n.name}"} for n in notes]


def on_files(files: Any, config: Any) -> Any:
    """Add the pages, and list them under "Reference" and "Decisions"; the style sheet of highlighted code."""
    from mkdocs.structure.files import File
    from pygments.formatters import HtmlFormatter

    colours = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    files.append(File.generated(config, "code.css", content=colours))

    sections = {name: item[name] for item in config.nav for name in item}
    for topic, names in topics().items():
        files.append(File.generated(config, f"reference/{topic}.md", content=page(topic, names)))
        sections["Reference"].append({TOPICS[topic]: f"reference/{topic}.md"})
    sections["Decisions"].extend(decisions(Path(config.docs_dir)))
    return files
