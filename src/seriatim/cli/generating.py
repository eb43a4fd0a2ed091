"""`seriatim generate`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seriatim.interop.grammar import Grammar
from seriatim.systems.image_system import ImageSystem
from seriatim.systems.language_model import Generation, LanguageModel
from seriatim.systems.published_masked import PublishedMasked
from seriatim.systems.system import System
from seriatim.systems.text_system import TextSystem
from seriatim.verbs.generate import draw, sampling_of, save_pictures, stream
from seriatim.verbs.load import load, where

PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical", "guidance", "steps", *PENALTIES)


def run_generate(options: argparse.Namespace) -> int:
    """Stream text, or write pictures and say where they are."""
    import torch

    system = loaded(options)
    sampling = {name: getattr(options, name) for name in SAMPLING}
    if options.chat and not isinstance(system, LanguageModel | PublishedMasked):
        raise ValueError(f"{system.meta.key} has no chat template: --chat is for language models that converse")
    with torch.inference_mode():
        if isinstance(system, LanguageModel):
            return _language(system, options, sampling)
        if isinstance(system, TextSystem):
            return _text(system, options, sampling)
        if not isinstance(system, ImageSystem):
            raise ValueError(f"{system.meta.key} is a tokenizer: it generates nothing by itself")
        return _pictures(system, options, sampling)


def loaded(options: argparse.Namespace) -> System:
    """The model that was asked for, in the format that was asked for."""
    import torch

    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    system = load(options.source, dtype, options.adapter, options.weights)
    if options.compile:
        if not isinstance(system, LanguageModel):
            raise ValueError(f"--compile is for language models, and this is {system.meta.key}")
        system.model.compile_decoding()
    return system


def _grammar(options: argparse.Namespace) -> Grammar | None:
    """What the text must be, if anything was said. Raises OSError for files that are not there."""
    if options.regex is not None:
        return Grammar("regex", options.regex)
    for kind, file in (("json_schema", options.json_schema), ("lark", options.grammar)):
        if file is not None:
            return Grammar(kind, Path(file).read_text(encoding="utf-8"))
    return None


def _language(system: LanguageModel, options: argparse.Namespace, sampling: dict[str, Any]) -> int:
    """Next-token models: text as it comes, or what it cost."""
    s = sampling_of(system, **sampling)
    given = _given(system, options)
    new = options.length or max(min(200, system.model.layout.size - len(given)), 1)
    grammar = _grammar(options)
    for n in range(options.count or 1):
        echoed = not options.json and options.ids is None and not options.chat and system.continues
        say = _Echo(options.prompt if echoed else "")
        made = system.generate(
            given, options.decoder, max_new_tokens=new, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p,
            min_p=s.min_p, typical=s.typical, seed=options.seed + n, stream=None if options.json else say,
            stop=options.stop, grammar=grammar, **{name: getattr(s, name) for name in PENALTIES},
        )  # fmt: skip
        assert isinstance(made, Generation)
        if not options.json:
            say("")
            print("" if made.text is not None else " ".join(map(str, made.ids)))
            continue
        figures = {
            "prompt": options.prompt, "text": made.text, "ids": made.ids, "forwards": made.forwards,
            "seconds": round(made.seconds, 4), "tokens_per_second": round(len(made.ids) / made.seconds, 2),
            "mean_accepted_length": round(len(made.ids) / max(made.forwards, 1), 3),
        }  # fmt: skip
        print(json.dumps(figures, ensure_ascii=False))
    return 0


def _given(system: LanguageModel | PublishedMasked, options: argparse.Namespace) -> list[int]:
    """Ids of what was asked: a text to continue, what a user says, or ids."""
    if options.chat:
        if options.ids is not None or not options.prompt:
            raise ValueError("--chat puts a text as what a user says: give it by --prompt")
        return system.chat_ids([{"role": "user", "content": options.prompt}])
    return system.prompt_ids(options.prompt) if options.ids is None else ids_of(options.ids)


class _Echo:
    """Says pieces of text, and before the first of them the prompt: not before it is known that there will be any."""

    def __init__(self, prompt: str):
        self.prompt = prompt

    def __call__(self, piece: str) -> None:
        _say(self.prompt + piece)
        self.prompt = ""


def _say(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _text(system: TextSystem, options: argparse.Namespace, sampling: dict[str, Any]) -> int:
    prompt = _given(system, options) if isinstance(system, PublishedMasked) else options.prompt
    for n in range(options.count or 1):
        trace: list[Any] = []
        start = time.perf_counter()
        pieces = stream(system, prompt, options.length, options.decoder, options.seed + n, trace=trace, **sampling)
        if not options.json:
            sys.stdout.write("" if options.ids is not None or options.chat else options.prompt)
            for piece in pieces:
                _say(piece)
            print()
            continue
        text = "".join(pieces)
        figures = {"forwards": sum(s.forwards for s in trace), "seconds": round(time.perf_counter() - start, 3)}
        print(json.dumps({"prompt": options.prompt, "text": text, **figures}, ensure_ascii=False))
    return 0


def _pictures(system: ImageSystem, options: argparse.Namespace, sampling: dict[str, Any]) -> int:
    labels = None if options.label is None else [label_of(text, system.classes) for text in options.label]
    pictures = draw(system, labels, options.count, options.seed, True, options.decoder, **sampling)
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


def run_export(options: argparse.Namespace) -> int:
    """Write the folder, and say what reads it."""
    import torch

    from seriatim.verbs.export import export

    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    out = export(options.source, options.out, options.format, dtype)
    print(f"{out}: transformers reads it, by from_pretrained({str(out)!r})")
    return 0


def ids_of(text: str) -> list[int]:
    """Whole numbers between commas or spaces. Raises ValueError for anything else."""
    words = text.replace(",", " ").split()
    if not words or not all(w.isdigit() for w in words):
        raise ValueError(f"--ids takes whole numbers between commas, got {text!r}")
    return [int(w) for w in words]


def label_of(text: str, classes: Sequence[str]) -> int:
    """A class by its name, or else its number. Raises ValueError where there is none such."""
    if text in classes:
        return classes.index(text)
    if text.lstrip("-").isdigit():
        return int(text)
    raise ValueError(f"there is no class {text!r}; there are {', '.join(classes[:20]) or 'no names, only numbers'}")
