"""Training of a part that drafts for a model that there is already: what it begins with, and what it leaves.

The states of the base are computed once, into a file under SERIATIM_HOME that belongs to the base and the text; every
part and every seed trains on the same ones.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import seriatim
from seriatim.data.base import DEFAULT, Data, load_data
from seriatim.data.conversations import Conversations
from seriatim.decoding.loop import decode
from seriatim.evaluation.cost import parameters
from seriatim.evaluation.draft_trees import Watched, save_trees, some_trees
from seriatim.evaluation.pictures import save_curve, write_beside
from seriatim.home import HOME
from seriatim.posttraining.drafting import CARD, RECIPE, Base, Part, card_of
from seriatim.posttraining.heads import AheadHeads, chances
from seriatim.posttraining.states import states_of, windows
from seriatim.systems.decoders import FAMILIES, Ask, Decoding
from seriatim.systems.encoder_decoder import EncoderDecoder
from seriatim.systems.language_model import LanguageModel
from seriatim.systems.meta import catalogue
from seriatim.systems.meta import load as load_module
from seriatim.systems.system import Sampling
from seriatim.systems.text_system import TextSystem, Windows
from seriatim.training.checkpoint import save_json
from seriatim.training.recipe import Recipe
from seriatim.verbs.finetune import Begun, found_again, origin, sides
from seriatim.verbs.load import load, plain

WINDOW = 256  # tokens, where there are so many, and a part says nothing else
HELD_OUT = 32  # windows that are looked at


@dataclass(frozen=True)
class Reading:
    """What of the text is read. tokens: how many, spread evenly (or all there are); window: how many at a time (None:
    256, or what the part says, or fewer where the model or the text has no more)."""

    tokens: int = 200_000
    window: int | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1 or (self.window is not None and self.window < 2):
            raise ValueError(f"at least 1 token is read, in windows of at least 2; got {self.tokens} and {self.window}")


def is_draft_part(key: str) -> bool:
    """Whether this names a decoder with a part to train."""
    return key in catalogue() and catalogue()[key][0].family in FAMILIES and hasattr(load_module(key), "Part")


def begin(
    key: str, from_: str | Path | None, data: str | Path | Data | None, folder: Path, size: str | None,
    settings: Mapping[str, Any], bar: Callable[[str], Any] | None = None, **data_options: Any,
) -> Begun:  # fmt: skip
    """A fresh part beside its frozen base, and the base's states on both sides of the data ("builtin" or None: the
    standard library). Raises ValueError, OSError that say what is wrong with the base, the data or the settings."""
    kind = load_module(key).Part
    config, recipe, reading = settings_from(key, size, settings)
    base, name = _base(key, kind, from_), origin(from_ or "")
    asked = DEFAULT["text"] if data in (None, "builtin") else data
    loaded = asked if isinstance(asked, Data) else load_data(asked, "text", **data_options)
    train, test, notes = _streams(base.system, loaded)
    window = _window(base.system, reading, len(train), len(test))
    if recipe.norm != "token":
        raise ValueError(f"the loss of {key} is divided as its paper says: leave out --norm")
    torch.manual_seed(recipe.seed)
    part = kind(config, base)
    if getattr(config, "draft_vocab", None) is not None:
        counts = torch.bincount(train.long(), minlength=base.vocab)
        often = counts.argsort(descending=True, stable=True)[: config.draft_vocab]
        part.output.draft_only(base, often)
        share = float(counts[often].sum() / counts.sum())
        notes += (f"{len(often):,} tokens are drafted, which make up {share:.1%} of the training text",)
    first, second = windows(train, window, reading.tokens), windows(test, window, HELD_OUT * window)
    examples, held_out = _examples(part, base, first, second, bar)
    passes = recipe.steps * recipe.batch / len(examples)
    notes += (f"{recipe.steps:,} steps of {recipe.batch} go through {first.numel():,} tokens {passes:.2g} times",)
    card = {
        "system": key, "from": name, "base": base.fingerprint, "config": plain(config), "recipe": plain(recipe),
        "reading": plain(reading), "data": found_again(asked, loaded), "classes": [], "version": seriatim.__version__,
    }  # fmt: skip
    learner = part.learner(base)
    if os.environ.get("RANK", "0") == "0" and not (folder / CARD).exists():
        save_json(card_of(part, base, name, _facts(card)), folder / CARD)
    return Begun(learner, replace(loaded, notes=loaded.notes + notes), examples, held_out, recipe, card)


def settings_from(key: str, size: str | None, settings: Mapping[str, Any]) -> tuple[Any, Recipe, Reading]:
    """Config, recipe and reading with what is changed of their defaults. Raises ValueError for a name that there is
    not."""
    module = load_module(key)
    sizes = getattr(module, "SIZES", {})
    if size is not None and size not in sizes:
        raise ValueError(f"{key} comes in {', '.join(sizes) or 'one size'}, not in {size!r}")
    recipe = getattr(module, "RECIPE", RECIPE)
    names = [{f.name for f in fields(x)} for x in (module.Config, Recipe, Reading)]
    every = set().union(*names)
    for name in settings:
        if name not in every:
            near = difflib.get_close_matches(name, every, 1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ValueError(f"{key} has no setting {name!r}{hint} Its settings: {', '.join(sorted(every))}")
    of_config, of_recipe, of_reading = ({k: v for k, v in settings.items() if k in own} for own in names)
    config = module.Config(**{**(sizes.get(size, {}) if size else {}), **of_config})
    return config, replace(recipe, **of_recipe), Reading(**{**module.Part.reading, **of_reading})


def _base(key: str, kind: type[Part], from_: str | Path | None) -> Base:
    if from_ is None:
        raise ValueError(f"{key} is trained beside a model that there is already: say which (--base MODEL)")
    system = load(from_)
    if kind.free:
        if not isinstance(system, TextSystem) or not system.model.factorization.free:
            raise ValueError(
                f"{from_} is {system.meta.key}, and {key} is trained beside models of tokens in any order, such as mdlm"
            )
        return Base(system)
    if not isinstance(system, LanguageModel) or not system.model.factorization.draftable:
        raise ValueError(f"{from_} is {system.meta.key}, and {key} is trained beside next-token models")
    if isinstance(system, EncoderDecoder):
        raise ValueError(
            f"{from_} ({system.meta.key}) answers to an encoder's input, which this training does not feed"
        )
    if system.tokenizer is None:
        raise ValueError(f"{from_} came without a tokenizer, so it reads no text; put its tokenizer.json beside it")
    return Base(system)


def _streams(system: Any, data: Data) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """The ids of both sides, one text behind another; conversations as their template writes them."""
    if isinstance(data.train, Conversations) and not isinstance(system, LanguageModel):
        raise ValueError(f"{data.name} holds conversations, which {system.meta.key} does not read: give texts")
    train, test, notes = sides(system, data)
    if isinstance(train, Windows):
        return train.ids, test.ids, ()
    first, second = (torch.cat([ids for ids, _ in side.samples]) for side in (train, test))
    return first, second, notes


def _window(system: Any, reading: Reading, *lengths: int) -> int:
    room = system.model.layout.size
    if reading.window is not None and reading.window > room:
        raise ValueError(f"the model takes {room} tokens in all, and a window of {reading.window} is asked for")
    return reading.window or min(WINDOW, room, *lengths)


def _examples(part: Part, base: Base, train: Tensor, test: Tensor, bar: Callable[[str], Any] | None) -> list[Any]:
    """What a part learns from, of windows of both sides."""
    displays: list[Any] = []
    made: list[Any] = []
    total, before = len(train) + len(test), 0
    for ids in (train, test):

        def tell(done: int, of: int, before: int = before) -> None:
            if bar is not None:
                displays[:] = displays or [bar("states" if part.on_states else "examples")]
                displays[0].update(before + done, total, {})

        made.append(states_of(base, ids, HOME / "states", tell) if part.on_states else part.examples(base, ids, tell))
        before += len(ids)
    for display in displays:
        display.close()
    return made


def _facts(card: Mapping[str, Any]) -> dict[str, Any]:
    """Of a training, as draft.json has them."""
    return {name: card[name] for name in ("recipe", "reading", "data", "version")}


# ---- what is left ----------------------------------------------------------------------------------------------------


def finish(begun: Begun, folder: Path, history: list[dict[str, float]]) -> None:
    """Measure what the best draft tree depends on, and note it beside the weights."""
    learner = begun.learner
    facts = _facts(begun.card) | {"steps": len(history), "parameters": parameters(learner.part)}
    facts |= {k: v for k, v in history[-1].items() if k.startswith("held_out_")} if history else {}
    if isinstance(learner.part, AheadHeads):
        found = chances(learner.part, learner.base, begun.held_out)
        facts["chance"] = [[round(c, 4) for c in row] for row in found]
        learner.part.chance = tuple(map(tuple, facts["chance"]))
    if os.environ.get("RANK", "0") == "0":
        save_json(card_of(learner.part, learner.base, begun.card["from"], facts), folder / CARD)


def show_part(key: str, system: Any, folder: Path, history: list[dict[str, float]]) -> dict[str, Any]:
    """Write what there is to see of a trained part: accuracy by distance, the loss, a text coloured by what was
    drafted, and some of the drafts; or what its own file shows (`shown`). The figures, as in summary.json."""
    last = history[-1]
    figures: dict[str, Any] = {k.removeprefix("held_out_"): v for k, v in last.items() if k.startswith("held_out_")}
    save_curve({"training": [h["loss"] for h in history]}, folder / "loss.png", y_label="nats per token", smooth=20)
    ahead = [n for n in range(1, 100) if f"top1_{n}" in figures]
    if ahead:
        both = {f"first {k}" if k > 1 else "first": [figures[f"top{k}_{n}"] for n in ahead] for k in (1, 5)}
        save_curve(
            both, folder / "accuracy.png", x_label="tokens behind the newest one", y_label="held-out tokens among",
            title=f"{key}: what its candidates get right",
        )  # fmt: skip
    module = load_module(key)
    ask = Ask(system, Sampling(temperature=0), system.stop, str(folder), module.Options())
    if hasattr(module, "shown"):
        figures |= module.shown(ask, folder)
        save_json(figures, folder / "summary.json")
        return figures
    way = module.decoder(ask)
    watched = None if way.proposer is None else Watched(way.proposer)
    figures |= coloured(system, replace(way, proposer=watched), PROMPT, folder / "drafted.html")
    if watched is not None and watched.drafts:
        title, decode_one = f"{key}: what was drafted, and (dark) what stood", lambda i: system.tokenizer.decode([i])
        save_trees(some_trees(watched.drafts), decode_one, folder / "trees.png", title)
    save_json(figures, folder / "summary.json")
    return figures


PROMPT = '''def read(path):
    """Read a text file and return its lines."""
'''
COLOURS = ("#d9d9d9", "#c7e9c0", "#a1d99b", "#74c476", "#41ab5d", "#238b45", "#006d2c")


def coloured(system: LanguageModel, way: Decoding, prompt: str, path: Path, length: int = 200) -> dict[str, Any]:
    """Write a text by a decoder, greedily, as a page that shows how far ahead each token was drafted (grey: it was
    not). Tokens a forward, and the share of drafted tokens that stood."""
    room = min(length, system.model.layout.size - len(system.tokenizer.encode(prompt)))
    canvas = system.prompted(prompt, room)
    target = system.target(None, Sampling(temperature=0), **way.target)
    with torch.inference_mode():
        steps = list(decode(target, canvas, way.decider, way.proposer))
    ids, at, spans = canvas.read("token")[0].tolist(), canvas.given_length, []
    for step in steps:
        count = int(step.accepted) + 1
        for i, token in enumerate(ids[at : at + count]):
            ahead = 0 if i >= int(step.accepted) else i + 1
            text = escape(system.tokenizer.decode([token]))
            spans.append(f'<span style="background:{COLOURS[min(ahead, len(COLOURS) - 1)]}">{text}</span>')
        at += count
    legend = "".join(f'<span style="background:{c}"> {n or "own"} </span>' for n, c in enumerate(COLOURS))
    page = f"<meta charset=utf-8><pre>{escape(prompt)}{''.join(spans)}</pre><p>tokens ahead: {legend}</p>\n"
    write_beside(path, lambda file: file.write(page.encode()))
    drafted, accepted = (sum(int(getattr(s, name)) for s in steps) for name in ("drafted", "accepted"))
    return {
        "tokens_per_forward": (len(ids) - canvas.given_length) / len(steps), "accepted": accepted / max(drafted, 1),
    }  # fmt: skip
