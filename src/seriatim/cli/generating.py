"""`seriatim generate`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seriatim.systems.image_system import ImageSystem
from seriatim.systems.text_system import TextSystem
from seriatim.verbs.generate import draw, save_pictures, stream
from seriatim.verbs.load import load, where

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical", "guidance", "steps")


def run_generate(options: argparse.Namespace) -> int:
    """Stream text, or write pictures and say where they are."""
    import torch

    system = load(options.source)
    sampling = {name: getattr(options, name) for name in SAMPLING}
    with torch.inference_mode():
        if isinstance(system, TextSystem):
            return _text(system, options, sampling)
        if not isinstance(system, ImageSystem):
            raise ValueError(f"{system.meta.key} is a tokenizer: it generates nothing by itself")
        return _pictures(system, options, sampling)


def _text(system: TextSystem, options: argparse.Namespace, sampling: dict[str, Any]) -> int:
    for n in range(options.count or 1):
        trace: list[Any] = []
        start = time.perf_counter()
        pieces = stream(
            system, options.prompt, options.length, options.decoder, options.seed + n, trace=trace, **sampling
        )
        if not options.json:
            sys.stdout.write(options.prompt)
            for piece in pieces:
                sys.stdout.write(piece)
                sys.stdout.flush()
            print()
            continue
        text = "".join(pieces)
        figures = {"forwards": sum(s.forwards for s in trace), "seconds": round(time.perf_counter() - start, 3)}
        print(json.dumps({"prompt": options.prompt, "text": text, **figures}, ensure_ascii=False))
    return 0


def _pictures(system: ImageSystem, options: argparse.Namespace, sampling: dict[str, Any]) -> int:
    labels = None if options.label is None else [label_of(text, system.classes) for text in options.label]
    pictures = draw(system, labels, options.count, options.seed, film=True, **sampling)
    folder = options.out or (
        Path("generated") if str(options.source).startswith("zoo:") else where(options.source) / "generated"
    )
    paths = save_pictures(pictures, folder, system.classes)
    n = len(pictures.images)
    figures = {"pictures": n, "forwards": pictures.forwards, "seconds": round(pictures.seconds, 3)}
    if options.json:
        print(json.dumps({**figures, "files": [str(p) for p in paths]}))
    else:
        print(
            f"{n} pictures, {pictures.forwards} forwards each, {pictures.seconds:.1f} s: {', '.join(map(str, paths))}"
        )
    return 0


def label_of(text: str, classes: Sequence[str]) -> int:
    """A class by its name, or else its number. Raises ValueError where there is none such."""
    if text in classes:
        return classes.index(text)
    if text.lstrip("-").isdigit():
        return int(text)
    raise ValueError(f"there is no class {text!r}; there are {', '.join(classes[:20]) or 'no names, only numbers'}")
