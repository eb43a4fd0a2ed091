"""`seriatim generate`."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from seriatim.cli.watching import Screen, painted, shows
from seriatim.evaluation.film_page import check_page, write_page
from seriatim.evaluation.text_film import Recorder
from seriatim.interop.grammar import Grammar
from seriatim.systems.image_system import ImageSystem
from seriatim.systems.infill import parted
from seriatim.systems.language_model import Generation, LanguageModel
from seriatim.systems.published_masked import PublishedMasked
from seriatim.systems.system import System
from seriatim.systems.text_system import TextSystem
from seriatim.verbs.generate import TOKENS, draw, fill, nothing, sampling_of, save_pictures, stream, texts_of
from seriatim.verbs.load import load, where
from seriatim.verbs.repaint import repainted

PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
BESIDE = ("prompt", "chat", "ids", "length", "label", "stop", "json_schema", "regex", "grammar")  # not with --infix
OF_PICTURES = ("size", "scales", "depth")
SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")
SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "typical", "guidance", "steps", *PENALTIES, *SUPPRESSED, "keep_tokens",
    *OF_PICTURES,
)  # fmt: skip


def run_generate(options: argparse.Namespace) -> int:
    """Stream text, or write pictures and say where they are."""
    import torch

    _check(options)
    system = loaded(options)
    for name in TOKENS:
        setattr(options, name, tokens_of(getattr(options, name)))
    sampling = {name: getattr(options, name) for name in SAMPLING}
    if not isinstance(system, TextSystem) and (options.infix is not None or options.record is not None):
        raise ValueError(
            f"--infix and --record are for text, and {system.meta.key} makes none (pictures have a film.gif)"
        )
    if isinstance(system, TextSystem) and any(getattr(options, name) is not None for name in (*OF_PICTURES, "image")):
        raise ValueError(f"--size, --scales, --depth and --image are for pictures, and {system.meta.key} writes text")
    if options.chat and not isinstance(system, LanguageModel | PublishedMasked):
        raise ValueError(f"{system.meta.key} has no chat template: --chat is for language models that converse")
    with torch.inference_mode():
        if isinstance(system, LanguageModel) and options.infix is None:
            return _language(system, options, sampling)
        if isinstance(system, TextSystem):
            return _text(system, options, sampling)
        if not isinstance(system, ImageSystem):
            raise ValueError(nothing(system.meta))
        return _pictures(system, options, sampling)


def _check(options: argparse.Namespace) -> None:
    """Before anything is loaded. Raises ValueError, OSError for what cannot be asked for together, gaps that are none,
    and a page that cannot be written."""
    if options.record is not None:
        check_page(options.record)
        if (options.count or 1) > 1:
            raise ValueError("--record is the film of one text: leave --count out")
    if (options.image is None) != (options.inpaint is None):
        raise ValueError("--image is a picture, --inpaint says which part of it is drawn anew: give both, or neither")
    if options.image is not None and options.decoder != "own":
        raise ValueError("a part of a picture is drawn by the system's own decoder: leave --decoder out")
    if options.image is not None and options.prompt:
        raise ValueError("a part of a picture is drawn anew by its class: give --label in place of --prompt")
    if options.infix is None:
        return
    parted(options.infix)
    others = [name for name in BESIDE if getattr(options, name)] + ["decoder"] * (options.decoder != "own")
    if others:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise ValueError(f"--infix says what text there is and where the gaps are: leave {names} out")
    if "\\n" in options.infix and "\n" not in options.infix:
        warnings.warn("\\n in --infix is a backslash and an n; bash reads $'...\\n...' as lines", stacklevel=1)


def loaded(options: argparse.Namespace) -> System:
    """The model that was asked for, in the format that was asked for."""
    system = load(options.source, options.dtype, options.adapter, options.weights)
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
    if options.guidance or options.keep_tokens:
        raise ValueError(f"{system.meta.key} writes each token from those before: there is nothing to guide it by")
    given = _given(system, options)
    new = options.length or max(min(200, system.model.layout.size - len(given)), 1)
    grammar = _grammar(options)
    for n in range(options.count or 1):
        echoed = not options.json and options.ids is None and not options.chat and system.continues
        say = _Echo(options.prompt if echoed else "")
        recorder = None if options.record is None else Recorder(system.tokenizer)
        made = system.generate(
            given, options.decoder, max_new_tokens=new, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p,
            min_p=s.min_p, typical=s.typical, seed=options.seed + n, stream=None if options.json else say,
            stop=options.stop, grammar=grammar, watch=recorder,
            **{name: getattr(s, name) for name in (*PENALTIES, *SUPPRESSED)},
        )  # fmt: skip
        assert isinstance(made, Generation)
        if options.json:
            print(json.dumps(_figures(options.prompt, made), ensure_ascii=False))
        else:
            say("")
            print("" if made.text is not None else " ".join(map(str, made.ids)))
        _record(system, options, recorder)
    return 0


def _figures(prompt: str, made: Generation) -> dict[str, Any]:
    return {
        "prompt": prompt, "text": made.text, "ids": made.ids, "forwards": made.forwards,
        "seconds": round(made.seconds, 4), "tokens_per_second": round(len(made.ids) / made.seconds, 2),
        "mean_accepted_length": round(len(made.ids) / max(made.forwards, 1), 3),
    }  # fmt: skip


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
        self.last = ""  # that was said

    def __call__(self, piece: str) -> None:
        text = self.prompt + piece
        self.prompt, self.last = "", text or self.last
        sys.stdout.write(text)
        sys.stdout.flush()


def _text(system: TextSystem, options: argparse.Namespace, sampling: dict[str, Any]) -> int:
    """Any other text: on a terminal the canvas as it fills, else pieces from its front; or what it cost."""
    console = Console(highlight=False)
    live = shows(console) and not options.quiet and not options.json
    asked = options.infix is None and isinstance(system, PublishedMasked)
    if options.ids is not None and not asked:
        raise ValueError(f"--ids are for language models as others publish them; give {system.meta.key} a --prompt")
    prompt = _given(system, options) if asked else options.prompt  # type: ignore[arg-type]
    for n in range(options.count or 1):
        trace: list[Any] = []
        recorder = Recorder(system.tokenizer) if live or options.record else None
        seed, watched = options.seed + n, {"trace": trace, "watch": recorder, **sampling}
        start = time.perf_counter()
        if options.infix is None:
            pieces = stream(system, prompt, options.length, options.decoder, seed, **watched)
        else:
            pieces = fill(system, options.infix, seed, **watched)
        if options.json:
            text, name = "".join(pieces), "prompt" if options.infix is None else "infix"
            figures = {"forwards": sum(s.forwards for s in trace), "seconds": round(time.perf_counter() - start, 3)}
            print(json.dumps({name: getattr(options, name), "text": text, **figures}, ensure_ascii=False))
        elif live:
            assert recorder is not None
            with Screen(console, recorder):
                for _ in pieces:
                    pass
            whole = painted(recorder.frames[-1])
            console.print(whole, soft_wrap=True, end="" if whole.plain.endswith("\n") else "\n")
        else:
            say = _Echo("" if options.ids is not None or options.chat else options.prompt)
            for piece in pieces:
                say(piece)
            say("")
            print(end="" if say.last.endswith("\n") else "\n")
        _record(system, options, recorder)
    return 0


def _record(system: TextSystem, options: argparse.Namespace, recorder: Recorder | None) -> None:
    """Write the page that was asked for, and say so where it is not mixed with the text."""
    if recorder is None or options.record is None:
        return
    recorder.finish()
    about = {"system": system.meta.title, "decoder": options.decoder, "seed": options.seed}
    about |= {name.replace("_", " "): x for name in SAMPLING if (x := getattr(options, name)) is not None}
    page = write_page(recorder.frames, options.record, str(options.source), about)
    print(f"{page}: how it came, to be opened in a browser", file=sys.stderr)


def _pictures(system: ImageSystem, options: argparse.Namespace, sampling: dict[str, Any]) -> int:
    labels = None if options.label is None else [label_of(text, system.classes) for text in options.label]
    if options.image is not None:
        ask = (options.image, options.inpaint, labels, options.count, options.seed)
        pictures = repainted(system, *ask, **sampling)
    else:
        pictures = draw(
            system, labels, options.count, options.seed, True, options.decoder, options.prompt, **sampling
        )  # fmt: skip
    folder = options.out or (
        Path("generated") if str(options.source).startswith("zoo:") else where(options.source) / "generated"
    )
    said = texts_of(options.prompt) if options.prompt else system.classes
    paths = save_pictures(pictures, folder, said, ink=system.ink)
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
    from seriatim.verbs.export import export

    out = export(options.source, options.out, options.format, options.dtype)
    print(f"{out}: transformers reads it, by from_pretrained({str(out)!r})")
    return 0


def tokens_of(words: Sequence[str] | None) -> list[int | str] | None:
    """Tokens as a command names them: whole numbers are ids."""
    return None if words is None else [int(word) if word.isdigit() else word for word in words]


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
