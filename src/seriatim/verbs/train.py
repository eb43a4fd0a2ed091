"""`train`: any system, on built-in data or anyone's, in a folder that can be resumed, generated from and compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

import seriatim
from seriatim.data.base import INK, Data, Pairs, load_data
from seriatim.data.conversations import Conversations
from seriatim.data.series import SeriesData
from seriatim.data.series_mixture import Mixture
from seriatim.interop.hub import HUB
from seriatim.systems.image_system import ImageSystem
from seriatim.systems.meta import catalogue
from seriatim.systems.series_system import SeriesSystem
from seriatim.systems.system import System, config_from, numbers_are
from seriatim.systems.text_system import TextSystem
from seriatim.systems.tokenizer_system import TokenizerSystem
from seriatim.tokenizers.files import load_tokenizer, make_tokenizer, save_tokenizer
from seriatim.tokenizers.text import ByteTokenizer, PairTokenizer, TextTokenizer, WordTokenizer, load_text_tokenizer
from seriatim.training.board import Board
from seriatim.training.checkpoint import save_json
from seriatim.training.recipe import Recipe
from seriatim.training.run import RunFolder
from seriatim.training.trainer import Tick
from seriatim.training.trainer import train as fit
from seriatim.verbs import drafting, finetune
from seriatim.verbs.finetune import Begun, found_again
from seriatim.verbs.load import load, plain, system_class, where
from seriatim.verbs.series import judgeable, told_apart

CHOSEN = "length", "dropout"  # fields that may differ from those of the model whose weights are taken over
FURTHER = "further"  # the name of the recipe, where there is one, of a system that begins with weights of another
Bar = Callable[[str], Any]  # makes a `Tick` for the phase it is given


@dataclass
class Trained:
    """A finished training."""

    system: System
    data: Data
    folder: Path
    history: list[dict[str, float]]


def train(
    key: str,
    data: str | Path | Data | None = None,
    *,
    from_: str | Path | None = None,
    lora: int | None = None,
    out: str | Path | None = None,
    size: str | None = None,
    tokenizer: str | Path | None = None,
    minutes: float | None = None,
    resume: bool = False,
    tensorboard: bool = False,
    settings: Mapping[str, Any] | None = None,
    bar: Bar | None = None,
    **data_options: Any,
) -> Trained:
    """Train a system by its key, on built-in data (its own by default) or a path.

    settings: any fields of its config or its recipe (`width`, `steps`, `batch`, `seed`, ...); size: one of its named
    sizes; tokenizer: a run of a tokenizer's training, `zoo:NAME`, or a kind; minutes: as many steps as fit, instead of
    the recipe's; resume: go on with what is in `out` (default: runs/KEY); tensorboard: write its events too.

    from_: train a next-token model further, whatever `load` reads, with its tokenizer, config and chat template; lora:
    the rank of an adapter that is trained in place of its weights. Data are texts, or conversations, of which answers
    alone count, or with a `teacher` among the settings what that model writes behind pieces of them; settings are those
    of `Tuning` and of the recipe. Where the key is a decoder with a part to train (medusa, hydra, ...), that part is
    trained beside the frozen model, and settings are the part's own, the recipe's and those of `drafting.Reading`. A
    system that begins as another (sdar) takes over its weights, and one that draws pictures goes on from a run of its
    own, or from released weights, with its tokenizer and sizes and, unless told, a tenth of its recipe's learning rate.

    Raises ValueError, KeyError, OSError with what is wrong and what to do, FloatingPointError where the loss breaks
    down.
    """
    folder = Path(out or f"runs/{key}")
    RunFolder(folder).refuse(resume)
    begun = _begin(key, data, from_, lora, folder, size, tokenizer, resume, dict(settings or {}), bar, data_options)
    if minutes is not None:
        begun.card["minutes"] = minutes
    with _shown(bar, key, Board(folder) if tensorboard else None) as tick:
        history = fit(
            begun.learner, begun.examples, begun.recipe, RunFolder(folder), begun.card, begun.held_out, resume, minutes,
            tick,
        )  # fmt: skip
    if drafting.is_draft_part(key):
        drafting.finish(begun, folder, history)
    system = begun.learner if isinstance(begun.learner, System) else begun.learner.finished()
    return Trained(system, begun.data, folder, history)


def _begin(
    key: str, data: str | Path | Data | None, from_: str | Path | None, lora: int | None, folder: Path,
    size: str | None, tokenizer: str | Path | None, resume: bool, settings: dict[str, Any], bar: Bar | None,
    data_options: Mapping[str, Any],
) -> Begun:  # fmt: skip
    """What is trained: a part beside a frozen model, a model that there is already, or one from the beginning."""
    if drafting.is_draft_part(key):
        if lora is not None or tokenizer is not None:
            raise ValueError(f"{key} is trained beside a frozen model: there is no adapter and no tokenizer to choose")
        return drafting.begin(key, from_, data, folder, size, settings, bar, **data_options)
    if from_ is None:
        if lora is not None:
            raise ValueError("an adapter is on a model that there is already: say which (--from)")
        return _fresh(key, data, folder, size, tokenizer, resume, settings, bar, data_options)
    if size is not None or tokenizer is not None:
        raise ValueError(f"size and tokenizer are those of {from_}, and are not chosen anew")
    cls = system_class(key)
    further = cls.begins_as is not None or issubclass(cls, ImageSystem)
    if further and not (key in finetune.CONVERSIONS and _is_published(from_)):
        return _taken_over(key, from_, data, folder, lora, settings, data_options)
    return finetune.begin(key, from_, data, folder, lora, settings, bar, **data_options)


def _is_published(place: str | Path) -> bool:
    """Whether a model stands there as others publish it, with a config.json or in one GGUF file."""
    return bool(HUB.fullmatch(str(place)) and not Path(place).exists()) or (
        not str(place).startswith("zoo:") and ((p := where(place)).suffix == ".gguf" or (p / "config.json").is_file())
    )


def _fresh(
    key: str, data: str | Path | Data | None, folder: Path, size: str | None, tokenizer: str | Path | None,
    resume: bool, settings: dict[str, Any], bar: Bar | None, data_options: Mapping[str, Any],
) -> Begun:  # fmt: skip
    """A system with fresh weights, and its data."""
    cls = system_class(key)
    recipe = recipe_from(cls, settings, size)
    loaded = _loaded(cls, data, data_options)
    torch.manual_seed(recipe.seed)
    tokens = tokenizer_for(cls, loaded, tokenizer, folder, resume, settings, recipe.seed, bar)
    own = {k: v for k, v in settings.items() if k not in _recipe_fields()}
    own.pop("tokenizer_steps", None)
    config = config_of(cls, own, size, loaded, tokens)
    torch.manual_seed(recipe.seed)
    return _begun(cls(config, tokens), recipe, data, loaded)


def _taken_over(
    key: str, from_: str | Path, data: str | Path | Data | None, folder: Path, lora: int | None,
    settings: dict[str, Any], data_options: Mapping[str, Any],
) -> Begun:  # fmt: skip
    """A system that begins with the weights of another, and its data. Raises ValueError where it cannot."""
    if lora is not None:
        raise ValueError(f"{key} begins with the weights of {from_} and trains them all: leave out the adapter")
    cls, base = system_class(key), load(from_)
    pictures, again, series = issubclass(cls, ImageSystem), base.meta.key == key, issubclass(cls, SeriesSystem)
    if base.meta.key != cls.begins_as and not (pictures and again):
        raise ValueError(f"{key} begins as a {cls.begins_as or key} model, and {from_} is {base.meta.key}")
    if data is None and pictures:  # what the base was trained on
        if where(from_).is_file():
            raise ValueError(f"{from_} does not say what it was trained on: say which pictures (--data)")
        data = RunFolder(where(from_)).trained_on()[0]
    recipe, loaded = recipe_from(cls, settings, FURTHER), _loaded(cls, data, data_options)
    if pictures:
        _fits(base, loaded, from_)
    if again and FURTHER not in cls.recipes and "learning_rate" not in settings:
        recipe = replace(recipe, learning_rate=recipe.learning_rate / 10)
    own = {k: v for k, v in settings.items() if k not in _recipe_fields()}
    if not pictures and not series and own.get("length", 0) > base.config.length:
        raise ValueError(f"{from_} reads {base.config.length} tokens, and a length of {own['length']} is asked for")
    chosen = (*CHOSEN, "horizon") if series and cls.rolls else CHOSEN  # type: ignore[attr-defined]
    shared = {k: v for k, v in cls.inherited(base, own).items() if k not in chosen or k not in own}
    config = config_from(cls, own, None, **shared)
    torch.manual_seed(recipe.seed)
    system = cls(config, base.tokenizer)
    system.take_over(base)
    if pictures:
        save_tokenizer(base.tokenizer, folder / "tokenizer")
    elif not series:
        save_json(base.tokenizer.to_json(), folder / "tokenizer.json")
    begun = _begun(system, recipe, data, loaded)
    begun.card["from"] = finetune.origin(from_)
    return begun


def _fits(base: System, data: Data, name: str | Path) -> None:
    """Raises ValueError where a system that draws pictures was made for others."""
    shape = tuple(data.train.take(torch.tensor([0]))["image"].shape[1:])
    side, classes = base.tokenizer.side, getattr(base.config, "classes", None)
    if shape[1:] != (side, side):
        raise ValueError(
            f"{name} draws pictures of {side}x{side} pixels, and those of {data.name} have {shape[2]}x{shape[1]}: "
            f"say --image-size {side}"
        )
    if classes is not None and len(data.classes) > classes:
        raise ValueError(f"{name} knows {classes} classes, and {data.name} has {len(data.classes)}")


def _loaded(cls: type[System], data: str | Path | Data | None, data_options: Mapping[str, Any]) -> Data:
    """The data of a system. Raises ValueError for those that it does not train on."""
    loaded = data if isinstance(data, Data) else load_data(data or cls.source, modality_of(cls), **data_options)
    if isinstance(loaded.train, Conversations):
        raise ValueError(f"{loaded.name} holds conversations: they train a next-token model further (--from)")
    return loaded


def _begun(system: System, recipe: Recipe, data: str | Path | Data | None, loaded: Data) -> Begun:
    system.classes, system.ink = loaded.classes, loaded.name in INK
    system.trained_by(recipe)
    examples, held_out = prepared(system, loaded)
    if isinstance(system, SeriesSystem):
        recipe = system.passing(recipe, examples)
    card: dict[str, Any] = {
        "system": system.meta.key, "config": plain(system.config), "recipe": plain(recipe),
        "data": found_again(data, loaded), "classes": list(loaded.classes), "version": seriatim.__version__,
    }  # fmt: skip
    if isinstance(loaded, SeriesData | Mixture):
        card |= {"read": dict(loaded.options), "series": told_apart(loaded)}
        judgeable(loaded, system)
    return Begun(system, loaded, examples, held_out, recipe, card)


def modality_of(cls: type[System]) -> str:
    """What kind of data a system takes."""
    if issubclass(cls, SeriesSystem):
        return "series"
    return "text" if issubclass(cls, TextSystem) else "image"


def config_of(cls: type[System], settings: Mapping[str, Any], size: str | None, data: Data, tokenizer: Any) -> Any:
    """The config that follows from the user's settings, the size, the data and the tokenizer."""
    if issubclass(cls, TextSystem):
        return config_from(cls, settings, size, vocab=tokenizer.vocab)
    if issubclass(cls, SeriesSystem):
        numbers_are(cls.Config, settings)
        return config_from(cls, {**cls.fitting(data, settings, size), **settings}, size)  # type: ignore[arg-type]
    if issubclass(cls, TokenizerSystem):
        shape = data.train.take(torch.tensor([0]))["image"].shape  # type: ignore[union-attr]
        return cls.Config.for_pictures(shape[2], shape[1], **settings)
    assert issubclass(cls, ImageSystem)
    return config_from(cls, settings, size, **cls.known(tokenizer, data))


def prepared(system: System, data: Data) -> tuple[Any, Any]:
    """Both sides of the data as the system draws them."""
    if isinstance(system, TextSystem) and isinstance(data.train, Pairs):
        return system.answered(data.train), system.answered(data.test)
    if isinstance(system, TextSystem):
        return system.examples(data.train.documents), system.examples(data.test.documents)  # type: ignore[union-attr]
    if isinstance(system, ImageSystem):
        return system.drawn_from(data.train), system.drawn_from(data.test)
    if isinstance(system, SeriesSystem):
        return system.examples(data.train), system.examples(data.validation)  # type: ignore[attr-defined]
    return data.train, data.test


def recipe_from(cls: type[System], settings: Mapping[str, Any], size: str | None) -> Recipe:
    """The recipe of a size with the user's changes."""
    numbers_are(Recipe, settings)
    recipes = cls.recipes
    base = recipes.get(size or "") or next(iter(recipes.values()))
    return replace(base, **{k: v for k, v in settings.items() if k in _recipe_fields()})


def _recipe_fields() -> set[str]:
    return {f.name for f in fields(Recipe)}


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def tokenizer_for(
    cls: type[System], data: Data, asked: str | Path | None, folder: Path, resume: bool,
    settings: Mapping[str, Any], seed: int, bar: Bar | None,
) -> Any:  # fmt: skip
    """The tokenizer of a run: made, trained in its folder, or taken from another run; a copy stands beside the run. A
    resumed run keeps the one it has."""
    if issubclass(cls, SeriesSystem) and asked is not None:
        raise ValueError(f"{cls.meta.key} reads numbers: leave out --tokenizer")
    if issubclass(cls, TokenizerSystem | SeriesSystem):
        return None
    if issubclass(cls, TextSystem):
        return _text_tokenizer(cls, data, asked, folder, resume, settings)
    assert issubclass(cls, ImageSystem)
    place = folder / "tokenizer"
    if asked is not None and str(asked) not in cls.tokenizers:
        trained = load(where(asked))
        if not isinstance(trained, TokenizerSystem):
            raise ValueError(f"{asked} is a run of {trained.meta.key}, which is no tokenizer")
        taken: Any = trained.model
        save_tokenizer(taken, place)
        return taken
    kind = str(asked or cls.tokenizer_for(data.train.take(torch.tensor([0]))["image"].shape[1:]))
    if resume and (place / "tokenizer.json").is_file():
        return load_tokenizer(place)
    if kind in catalogue():
        steps = {"steps": settings["tokenizer_steps"]} if "tokenizer_steps" in settings else {}
        run = train(kind, data, out=place, resume=resume, settings={"seed": seed, **steps}, bar=bar)
        made: Any = run.system.model
    else:
        shape = data.train.take(torch.tensor([0]))["image"].shape  # type: ignore[union-attr]
        pictures = {"side": shape[2], "channels": shape[1]}
        made = make_tokenizer(kind, {**pictures, **cls.tokenizer_settings_for(shape[1:])})
    save_tokenizer(made, place)
    return made


def _text_tokenizer(
    cls: type[TextSystem], data: Data, asked: str | Path | None, folder: Path, resume: bool, settings: Mapping[str, Any]
) -> TextTokenizer:
    kind, there = str(asked or cls.tokenizers[0]), folder / "tokenizer.json"
    words = data.train.words if isinstance(data.train, Pairs) else ()
    if resume and there.is_file():
        return load_text_tokenizer(there)
    if words and asked is None:
        made: TextTokenizer = WordTokenizer.of(words)
    elif kind == "bytes":
        made = ByteTokenizer()
    elif kind in ("bpe", "words"):
        learn = PairTokenizer.train if kind == "bpe" else WordTokenizer.train
        if words:
            raise ValueError(f"each word of {data.name} is to be one token: leave out --tokenizer, and it is")
        pairs = isinstance(data.train, Pairs)
        texts = [a + b for a, b in data.train.pairs] if pairs else data.train.documents
        made = learn(texts, int(settings.get("vocab", 4096)))
    else:
        made = load_text_tokenizer(where(kind) if kind.startswith("zoo:") else Path(kind))
    save_json(made.to_json(), there)
    return made


# ---- progress --------------------------------------------------------------------------------------------------------


class _shown:
    """A phase on the terminal, if anybody watches."""

    def __init__(self, bar: Bar | None, name: str, board: Board | None = None):
        self.display, self.board = bar(name) if bar else None, board

    def __enter__(self) -> Tick:
        return self.tell

    def tell(self, step: int, steps: int, figures: Mapping[str, float]) -> None:
        if self.display is not None:
            self.display.update(step, steps, figures)
        if self.board is not None:
            self.board(step, steps, figures)

    def __exit__(self, *error: Any) -> None:
        for shown in (self.display, self.board):
            if shown is not None:
                shown.close()
