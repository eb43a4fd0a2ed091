"""What a fine-tuning begins with: a model that there is already, its data, and the files that describe the result."""

from __future__ import annotations

import difflib
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import seriatim
from seriatim.data.base import BUILT_IN, Data, Pairs, load_data
from seriatim.data.conversations import Conversations
from seriatim.interop.export import describe
from seriatim.interop.families import CONVERTED
from seriatim.interop.hub import HUB
from seriatim.interop.peft import CONFIG, adapter_config
from seriatim.systems.converted import converted
from seriatim.systems.decoders import decoder_of
from seriatim.systems.language_model import LanguageModel
from seriatim.systems.published import Published
from seriatim.systems.published_masked import PublishedMasked
from seriatim.systems.system import Sampling
from seriatim.systems.text_system import Windows
from seriatim.systems.tuned import Aligned, Tuned, TunedByLayers, Tuning
from seriatim.tokenizers.text import id_stream
from seriatim.training.checkpoint import save_json
from seriatim.training.recipe import Recipe
from seriatim.training.run import RunFolder
from seriatim.verbs.load import load, plain
from seriatim.verbs.teaching import taught

CONVERSIONS: dict[str, int | None] = {"sdar": 4, "mdlm": None}  # what a next-token model becomes: tokens of a block
# Steps of its training, unless they are asked for. Much is new to it: it takes ten times the rate of one further step.
CONVERTING = Recipe(400, batch=8, learning_rate=2e-4, weight_decay=0.0, bf16=True)


class Begun(NamedTuple):
    """A learner, both sides of its data as it draws them, and what the run will be."""

    learner: Any  # a system, or what is trained of it
    data: Data
    examples: Any
    held_out: Any
    recipe: Recipe
    card: dict[str, Any]


def begin(
    key: str, base: str | Path, data: str | Path | Data | None, folder: Path, lora: int | None,
    settings: Mapping[str, Any], bar: Callable[[str], Any] | None = None, **data_options: Any,
) -> Begun:  # fmt: skip
    """A model to be trained on, with the files that stand beside its weights written to `folder`. Raises ValueError,
    OSError that say what is wrong with the base, the data or the settings."""
    own = dict(settings)
    how = {name: own.pop(name, None) for name in ("block", "mask") if key in CONVERSIONS}
    tuning, recipe = settings_from(own, lora)
    if tuning.teacher is not None:
        if key in CONVERSIONS or tuning.decoder is not None:
            raise ValueError("what a teacher writes is learned by a next-token model with all its layers")
        tuning = replace(tuning, teacher=origin(tuning.teacher))
    if data is None:
        raise ValueError("say on what to train the model further: --data, a text, a folder of texts, or conversations")
    system: Any = load(base)
    if not isinstance(system, LanguageModel) or key not in ("next-token", *CONVERSIONS):
        raise ValueError(f"{base} is {system.meta.key}: next-token models are trained further, as `train next-token`")
    if system.model.conditions:
        raise ValueError(
            f"{base} ({system.meta.key}) answers to an encoder's input, which training further does not feed"
        )
    if system.tokenizer is None:
        raise ValueError(f"{base} came without a tokenizer, so it reads no text; put its tokenizer.json beside it")
    room = system.model.layout.size
    if tuning.length is not None and tuning.length > room:
        raise ValueError(f"{base} takes {room} tokens in all, and a length of {tuning.length} is asked for")
    loaded = data if isinstance(data, Data) else load_data(data, "text", **data_options)
    examples, held_out, notes = sides(system, loaded, tuning.length)
    if tuning.teacher is not None:
        examples, held_out, more = taught(system, examples, held_out, tuning, folder, bar)
        notes += more
    torch.manual_seed(recipe.seed)
    if key in CONVERSIONS:
        system = converted(system, how["block"] or CONVERSIONS[key], how["mask"])
        tuned = {k: v for k, v in plain(CONVERTING).items() if k not in own and (k != "learning_rate" or lora is None)}
        recipe = replace(recipe, **tuned)
    system.trained_by(recipe)
    learner = learner_of(system, tuning)
    if recipe.norm != "token" and isinstance(learner, TunedByLayers):
        raise ValueError("what a model learns to do without layers is divided by tokens: leave out --norm")
    where = origin(base)
    if os.environ.get("RANK", "0") == "0" and not RunFolder(folder).card.exists():
        beside(folder, learner, where)
    card = {
        "system": key, "from": where, "tuning": plain(tuning), "recipe": plain(recipe),
        "data": found_again(data, loaded), "classes": [], "version": seriatim.__version__,
    }  # fmt: skip
    if not isinstance(system, Published | PublishedMasked):
        card["config"] = plain(system.config)
    passes = recipe.steps * recipe.batch * _share(examples)
    notes += (f"{recipe.steps:,} steps of {recipe.batch} go through the training data {passes:.2g} times",)
    return Begun(learner, replace(loaded, notes=loaded.notes + notes), examples, held_out, recipe, card)


def learner_of(system: LanguageModel, tuning: Tuning) -> Tuned:
    """What is trained of a model. Raises ValueError for a decoder that leaves out no layers."""
    if tuning.decoder is None:
        return (Tuned if tuning.teacher is None else Aligned)(system, tuning.adapter)
    layers = decoder_of(system, tuning.decoder, Sampling()).target.get("layers")
    if layers is None:
        raise ValueError(
            f"{tuning.decoder} runs all layers, so there is nothing to learn for it: name skipdecode, ffn-skipllm or "
            "first, with its options"
        )
    return TunedByLayers(system, layers, tuning.adapter)


def settings_from(settings: Mapping[str, Any], lora: int | None) -> tuple[Tuning, Recipe]:
    """What is changed of the defaults. Raises ValueError for a name that there is not."""
    own, of_recipe = ({f.name for f in fields(x)} for x in (Tuning, Recipe))
    for name in settings:
        if name not in own | of_recipe:
            near = difflib.get_close_matches(name, own | of_recipe, 1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ValueError(
                f"fine-tuning has no setting {name!r}{hint} Its settings: {', '.join(sorted(own | of_recipe))}; sizes "
                "are the base model's"
            )
    chosen = {k: v for k, v in settings.items() if k in own}
    tuning = Tuning(**({} if lora is None else {"lora": lora}) | chosen)
    return tuning, replace(tuning.recipe, **{k: v for k, v in settings.items() if k in of_recipe})


def sides(system: Any, data: Data, length: int | None = None) -> tuple[Any, Any, tuple[str, ...]]:
    """Both sides as training draws them, and what a user should hear of them. Texts that are shorter than a window make
    the window shorter, unless its length was asked for."""
    if isinstance(data.train, Conversations):
        train, test = (system.answers(side, length) for side in (data.train, data.test))
        return train, test, (*train.notes, *(note for note in test.notes if note not in train.notes))
    if isinstance(data.train, Pairs):
        return system.answered(data.train), system.answered(data.test), ()
    ids = [id_stream(system.tokenizer, side.documents, system.stop[:1]) for side in (data.train, data.test)]
    window = length or min(system.window, *map(len, ids))
    short = window < system.window and length is None
    notes = (f"windows are {window:,} tokens long: the held-out text has no more",) if short else ()
    train_side, test_side = (Windows(side, window) for side in ids)
    return train_side, test_side, notes


def _share(examples: Any) -> float:
    """Of the training data that one sample is."""
    return examples.length / len(examples.ids) if isinstance(examples, Windows) else 1 / len(examples)


def found_again(data: str | Path | Data | None, loaded: Data) -> str:
    """The name of built-in data, or the whole path of others: a run is evaluated from anywhere."""
    if not isinstance(data, str | Path) or loaded.name in BUILT_IN:
        return loaded.name
    several = not Path(data).expanduser().exists() and "," in str(data)
    whole = [Path(one).expanduser() for one in (str(data).split(",") if several else [str(data)])]
    if not several and not whole[0].exists():
        return loaded.name
    return ",".join(str(path.resolve()) if path.exists() else str(path) for path in whole)


def origin(base: str | Path) -> str:
    """Where the base model is, from anywhere: a name of the hub or the zoo, or a whole path."""
    text, path = str(base), Path(base).expanduser()
    named = text.startswith("zoo:") or (HUB.fullmatch(text) is not None and not path.exists())
    return text if named else str(path.resolve())


def beside(folder: Path, learner: Tuned, base: str) -> None:
    """Everything of the result but its weights: config, tokenizer and template of a published model, or of an adapter
    what it is on. A run of ours keeps its tokenizer."""
    system = learner.system
    folder.mkdir(parents=True, exist_ok=True)
    if learner.adapter is not None:
        said = adapter_config(base, learner.adapter, system.parts, learner.targets)
        save_json(said | {k: v for k, v in getattr(system, "raw", {}).items() if k == CONVERTED}, folder / CONFIG)
    elif isinstance(system, Published | PublishedMasked):
        with tempfile.TemporaryDirectory(dir=folder, prefix=".part") as part:
            describe(Path(part), system.raw, system.settings, learner.dtype, system.tokenizer, system.chat)
            for file in Path(part).iterdir():
                os.replace(file, folder / file.name)
    else:
        save_json(system.tokenizer.to_json(), folder / "tokenizer.json")
