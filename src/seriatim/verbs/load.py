"""From a folder that a training wrote (or `zoo:NAME`) back to a system with weights."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch

from seriatim.backbones.quantize import quantize
from seriatim.data.base import INK
from seriatim.home import HOME
from seriatim.interop.fields import read_config
from seriatim.interop.hub import HUB, from_hub
from seriatim.interop.peft import CONFIG as ADAPTER
from seriatim.interop.peft import base_of, conversion_of, read_adapter
from seriatim.posttraining.drafting import CARD as DRAFT
from seriatim.posttraining.drafting import read_card
from seriatim.posttraining.lora import merge
from seriatim.systems.converted import as_masked
from seriatim.systems.language_model import LanguageModel
from seriatim.systems.meta import catalogue
from seriatim.systems.meta import load as load_module
from seriatim.systems.published import Published, load_published
from seriatim.systems.published_images import SUFFIXES, load_published_images
from seriatim.systems.published_masked import PublishedMasked
from seriatim.systems.system import System
from seriatim.training.checkpoint import load_weights
from seriatim.training.run import RunFolder

ZOO = (Path(__file__).parents[1] / "zoo", Path(__file__).parents[3] / "zoo")  # installed; in a clone

MOST_ADAPTERS = 8  # one on another


FORMATS = ("float32", "bfloat16", "float16", "float64")


def number_format(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A number format by its name. Raises ValueError for what is none."""
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and name not in FORMATS:
        raise ValueError(f"a number format is {', '.join(FORMATS)}, not {dtype!r}")
    return None if dtype is None else getattr(torch, name)


def load(
    source: str | Path, dtype: torch.dtype | str | None = None, adapter: str | Path | None = None,
    weights: str | None = None,
) -> System:  # fmt: skip
    """A system with weights, ready to generate: a run's folder, `zoo:NAME`, the folder of a published language model
    (config.json and safetensors), its name on the Hugging Face hub (`owner/name`), or an adapter's folder, which names
    its base.

    dtype: the number format of the weights, or its name (None: as stored); adapter: the folder or name of a LoRA
    adapter in PEFT's format, which is folded into the weights; weights: keep matrices as "int8" or "int4", or "packed"
    for this processor (`quantize`). Raises ValueError, OSError that says what is wrong: nothing there, a checkpoint cut
    short or of another system, an adapter of another model, no network.
    """
    dtype = number_format(dtype)
    adapters = [] if adapter is None else [_found(adapter)]
    place = _found(source)
    while (place / ADAPTER).is_file():
        if place in adapters or len(adapters) > MOST_ADAPTERS:
            raise ValueError(f"{place} is an adapter on itself, or on too many others")
        adapters.append(place)
        place = _base_of(place)
    system = _load(place, dtype)
    if dtype is not None:
        system.model.to(dtype)  # a published one is in it already
        if isinstance(system.tokenizer, torch.nn.Module):
            system.tokenizer.to(dtype)
    for folder in reversed(adapters):
        how = conversion_of(folder)
        if how is not None and isinstance(system, Published):  # it was learned on a model that decides masks
            system = as_masked(system, how)
        if not isinstance(system, LanguageModel | PublishedMasked):
            raise ValueError(f"{folder} is an adapter of a language model, and {place} is {system.meta.key}")
        try:
            merge(system.model, system.parts, read_adapter(folder).factors)
        except ValueError as error:
            raise ValueError(f"{folder} does not fit {place}: {error}") from None
    if weights is not None:
        quantize(system.model, weights)
    return system


def _found(source: str | Path) -> Path:
    """The folder of a run or a model, downloaded if it is on the hub."""
    if HUB.fullmatch(str(source)) and not Path(source).parent.exists():  # else a path, mistyped perhaps
        source = from_hub(str(source))
    return where(source)


def _base_of(adapter: Path) -> Path:
    """The model that an adapter is on, by what its config says. Raises ValueError, OSError where it is not found."""
    base = base_of(adapter)
    if not base:
        raise ValueError(f"{adapter} is an adapter that does not name its base: seriatim.load(BASE, adapter={adapter})")
    try:
        return _found(base)
    except OSError as error:
        raise FileNotFoundError(
            f"{adapter} is an adapter on {base}, which is not found ({error}); where it is now, say "
            f"seriatim.load(BASE, adapter={str(adapter)!r})"
        ) from None


def _load(place: Path, dtype: torch.dtype | None) -> System:
    """A model whose own weights stand in a folder or a GGUF file."""
    folder = RunFolder(place)
    if (place / DRAFT).is_file():
        card = read_card(place)
        raise ValueError(
            f"{place} is a part beside {card['base']['name']}, and no model: decode that by "
            f"--decoder {card['key']}:{place}"
        )
    if folder.card.is_file() and not folder.weights.is_file():
        raise ValueError(f"{folder.path} holds no weights yet: its training has not come to its first checkpoint")
    if place.suffix in SUFFIXES:
        return load_published_images(place)
    if place.suffix == ".gguf" or (place / "config.json").is_file():
        return _published(place, dtype)
    card = folder.read_card()
    key = card.get("system")
    if key not in catalogue():
        raise ValueError(f"{folder.card} is of a system that is not known here: {key!r}")
    cls = system_class(key)
    tokenizer = load_tokenizer_of(folder.path)
    system = cls(cls.Config(**card["config"]), tokenizer)
    load_weights(system.weights_to_keep(), folder.weights)
    system.classes, system.ink = tuple(card.get("classes", ())), card.get("data") in INK
    return system.eval().requires_grad_(False)


def _published(place: Path, dtype: torch.dtype | None) -> System:
    """A model that somebody published: one of any order where its format says so, else a language model."""
    raw = {} if place.suffix == ".gguf" else read_config(place)
    if raw.get("model_type") == "xlnet":
        from seriatim.systems.text.as_arm import published

        return published(place, raw, dtype)
    return load_published(place, dtype)


def where(source: str | Path) -> Path:
    """The folder of `zoo:NAME`, of `home:NAME` (SERIATIM_HOME/models), or a path. Raises FileNotFoundError that names
    what there is."""
    text = str(source)
    if text.startswith("home:"):
        if not (HOME / "models" / text[5:] / "config.json").is_file():
            raise FileNotFoundError(
                f"there is no model {HOME / 'models' / text[5:]}; `python benchmarks/get_smollm2.py` puts SmolLM2 there"
            )
        return HOME / "models" / text[5:]
    if not text.startswith("zoo:"):
        if not Path(text).is_dir() and not (text.endswith((".gguf", *SUFFIXES)) and Path(text).is_file()):
            raise FileNotFoundError(f"there is no folder {text}; give the folder of a run, or one of {_zoo_names()}")
        return Path(text)
    for root in ZOO:
        if any((root / text[4:] / name).is_file() for name in ("run.json", "tokenizer.json")):
            return root / text[4:]
    raise FileNotFoundError(f"the zoo has no {text[4:]!r}; it has {_zoo_names()}")


def _zoo_names() -> str:
    files = (p for root in ZOO for name in ("run.json", "tokenizer.json") for p in root.glob(f"*/{name}"))
    names = sorted({p.parent.name for p in files})
    return ", ".join(f"zoo:{n}" for n in names) or "nothing yet"


def system_class(key: str) -> type[System]:
    """The class of a system by its key. Raises KeyError that lists what there is."""
    module = load_module(key)
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, System) and value.__dict__.get("meta") is module.META:
            return value
    raise ValueError(f"{key} can be composed in Python, but not trained by name yet")


def load_tokenizer_of(folder: Path) -> Any:
    """The tokenizer that stands beside the weights; None where a system has none."""
    from seriatim.tokenizers.text import load_text_tokenizer

    if (folder / "tokenizer.json").is_file():
        return load_text_tokenizer(folder)
    if (folder / "tokenizer").is_dir():
        from seriatim.tokenizers import load_tokenizer

        return load_tokenizer(folder / "tokenizer")
    return None


def plain(config: Any) -> dict[str, Any]:
    """A config as JSON takes it."""
    return asdict(config) if is_dataclass(config) and not isinstance(config, type) else dict(config)
