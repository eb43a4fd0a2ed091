"""`seriatim data`: what data there are, and those that are made once from downloads."""

from __future__ import annotations

import argparse
import difflib

from rich.console import Console

from seriatim.data import emoji
from seriatim.data.base import BUILT_IN, OPTIONAL, load_data


def run_data(options: argparse.Namespace) -> int:
    """List the data, or make those named. Raises KeyError for data that are not made, and what making raises."""
    console = Console()
    if options.name is None:
        for name, modality in BUILT_IN.items():
            console.print(f"{name:12} {modality:6} built in", highlight=False)
        for name, modality in OPTIONAL.items():
            state = f"at {emoji.kept_at()}" if emoji.kept_at().is_file() else f"not made yet: seriatim data {name}"
            console.print(f"{name:12} {modality:6} {state}", highlight=False, soft_wrap=True)
        return 0
    if options.name not in OPTIONAL:
        what = "is built in, and needs no making" if options.name in BUILT_IN else "is no data that is made"
        near = difflib.get_close_matches(options.name, OPTIONAL, n=1)
        hint = f"; did you mean {near[0]}?" if near else f": that is {', '.join(OPTIONAL)}"
        raise KeyError(f"{options.name!r} {what}{hint}")
    path = emoji.kept_at()
    if path.is_file() and not options.again:
        console.print(
            f"{options.name} is there already: {path} (--again makes it anew)", highlight=False, soft_wrap=True
        )
    else:
        path = emoji.make_emoji(options.source, lambda line: console.print(line, highlight=False, soft_wrap=True))
    data = load_data(options.name, OPTIONAL[options.name])
    console.print(
        f"{path}\n{len(data.train):,} pictures to train on, {len(data.test):,} held out; classes: "
        f"{', '.join(data.classes)}\nUse it as --data {options.name}.",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return 0
