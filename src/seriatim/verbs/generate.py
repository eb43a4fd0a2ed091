"""`generate`: text as it is decided, pictures as a grid and a film of their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seriatim.evaluation.pictures import save_film, save_grid
from seriatim.systems.decoders import Onlooker, decoder_of
from seriatim.systems.image_system import ImageSystem, Pictures
from seriatim.systems.meta import Meta
from seriatim.systems.system import Sampling, System
from seriatim.systems.text_system import TextSystem
from seriatim.systems.tokens import token_ids
from seriatim.verbs.load import load

TOKENS = ("suppress_tokens", "begin_suppress_tokens", "keep_tokens")


def generate(
    source: str | Path | System,
    *,
    prompt: str = "",
    infix: str | None = None,
    labels: Sequence[int] | None = None,
    count: int | None = None,
    length: int | None = None,
    decoder: str = "own",
    seed: int = 0,
    film: bool = False,
    watch: Onlooker | None = None,
    **sampling: Any,
) -> str | Pictures:
    """Text that continues a prompt, a text with its gaps filled (`infix`, see `parted`), or pictures of these classes,
    or of a prompt where the system was trained by texts (several with commas between them), from a run, `zoo:NAME` or a
    loaded system.

    sampling: fields of `Sampling` (temperature, top_k, top_p, guidance, steps, suppress_tokens, size, ...); what is
    left out is the system's own choice. watch: who looks on while a text is generated. With a recorder every canvas of
    every step is there afterwards, whatever the order and the decoder:

        recorder = Recorder(system.tokenizer)  # evaluation.text_film
        text = generate(system, prompt="def ", watch=recorder)
        recorder.histories  # after each step the ids in reading order, None where none is decided
    """
    system = source if isinstance(source, System) else load(source)
    if isinstance(system, TextSystem) and infix is not None:
        if prompt or length is not None or decoder != "own":
            raise ValueError("a text with gaps says all: leave prompt, length and decoder out")
        return "".join(fill(system, infix, seed, watch=watch, **sampling))
    if isinstance(system, TextSystem):
        return "".join(stream(system, prompt, length, decoder, seed, watch=watch, **sampling))
    if watch is not None:
        raise ValueError(f"a text is watched, and {system.meta.key} makes none (pictures have a film)")
    if not isinstance(system, ImageSystem):
        raise ValueError(nothing(system.meta))
    return draw(system, labels, count, seed, film, decoder, prompt, **sampling)


def nothing(meta: Meta) -> str:
    """Why a system generates nothing."""
    if meta.modality == "series":
        return f"{meta.key} forecasts series: seriatim forecast RUN --data my.csv"
    return f"{meta.key} is a tokenizer: it generates nothing by itself"


def stream(
    system: TextSystem, prompt: str | list[int], length: int | None = None, decoder: str = "own", seed: int = 0,
    trace: list[Any] | None = None, watch: Onlooker | None = None, **sampling: Any,
) -> Iterator[str]:  # fmt: skip
    """Pieces of text as they are decided, behind a text (of models that decide masks, or its ids). Raises
    ValueError for a decoder that does not exist or does not suit."""
    s = sampling_of(system, **sampling)
    asked = system.asked(prompt)  # a draft model reads the same prompt
    return asked.stream(prompt, length, s, seed, decoder_of(asked, decoder, s), trace, watch)


def fill(
    system: TextSystem, infix: str, seed: int = 0, trace: list[Any] | None = None, watch: Onlooker | None = None,
    **sampling: Any,
) -> Iterator[str]:  # fmt: skip
    """Pieces of a text whose marked gaps are filled, from its front. Raises ValueError for marks that are none, and
    gaps that this system cannot fill."""
    return system.infill(infix, sampling_of(system, **sampling), seed, trace=trace, watch=watch)


def draw(
    system: ImageSystem, labels: Sequence[int] | None, count: int | None, seed: int = 0, film: bool = False,
    decoder: str = "own", prompt: str = "", **sampling: Any,
) -> Pictures:  # fmt: skip
    """`count` pictures of each label; of every class in turn where no label is given; or of what each of several texts
    with commas between them says (`prompt`; labels are then their numbers). Raises ValueError for a decoder that does
    not exist or does not suit, and for texts where the system was trained by classes."""
    if count is not None and count < 1:
        raise ValueError(f"at least 1 picture can be drawn, got {count}")
    classes = system.config.classes
    if prompt:
        if labels is not None:
            raise ValueError("pictures are asked for by a prompt or by labels: give one of them")
        texts = texts_of(prompt)
        system, labels, classes = system.prompted(texts), range(len(texts)), len(texts)
    if labels is None and {"class", "text"} & set(system.model.conditions):
        wanted = torch.arange(count or min(classes, 100)) % classes
    else:
        wanted = torch.tensor(list(labels or [0])).repeat_interleave(count or 1)
    if int(wanted.min()) < 0 or int(wanted.max()) >= classes:
        raise ValueError(f"labels lie in 0..{classes - 1}, got {int(wanted.min())}..{int(wanted.max())}")
    return system.draw(wanted, None, sampling_of(system, **sampling), seed, film, decoder)


def texts_of(prompt: str) -> list[str]:
    """The texts of a prompt for pictures, between its commas."""
    return [text.strip() for text in prompt.split(",") if text.strip()] or [prompt]


def sampling_of(system: System, **changes: Any) -> Sampling:
    """The system's own way of sampling with changes; None leaves a setting alone. Tokens are ids, or named as by
    `token_ids`. Raises ValueError for settings and tokens that there are not."""
    known = {f.name for f in fields(Sampling)}
    for name in TOKENS:
        if changes.get(name) is not None:
            changes[name] = token_ids(getattr(system, "tokenizer", None), changes[name])
    unknown = set(changes) - known
    if unknown:
        raise ValueError(
            f"there is no sampling setting {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}"
        )
    return replace(system.sampling, **{k: v for k, v in changes.items() if v is not None})


def save_pictures(
    pictures: Pictures, folder: Path, classes: Sequence[str] = (), columns: int = 10, ink: bool = False
) -> list[Path]:
    """samples.png and, where there are frames, film.gif and order.png: which forward decided each element, the first
    ones pale, the last ones dark. ink: 1 is black."""
    side = pictures.images.shape[-1]
    look: dict[str, Any] = {"columns": min(columns, len(pictures.images)), "upscale": max(1, 64 // side)}
    if side <= 16:
        look["resample"] = "bicubic"
    look["invert"] = ink
    rows = _row_labels(pictures.labels, classes, look["columns"])
    paths = [save_grid(pictures.images, folder / "samples.png", row_labels=rows, **look)]
    if pictures.frames:
        paths.append(
            save_film(pictures.frames, folder / "film.gif", captions=pictures.captions, row_labels=rows, **look)
        )
    if pictures.decided is not None:
        look["invert"], look["resample"], look["upscale"] = True, "nearest", max(1, 64 // pictures.decided.shape[-1])
        share = (pictures.decided - 1) / max(pictures.forwards - 1, 1)
        paths.append(save_grid(2 * share[:, None] - 1, folder / "order.png", row_labels=rows, **look))
    return paths


def _row_labels(labels: Tensor | None, classes: Sequence[str], columns: int) -> list[str] | None:
    """The class of each row, where a row is of one class."""
    if labels is None or len(labels) % columns:
        return None
    rows = labels.view(-1, columns)
    if bool((rows != rows[:, :1]).any()):
        return None
    return [classes[i] if i < len(classes) else str(i) for i in rows[:, 0].tolist()]
