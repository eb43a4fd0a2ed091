"""A published language model from its folder: config, weights, tokenizer, and how it wants to be sampled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seriatim.interop.blueprint import Blueprint, EncoderDecoderBlueprint, MaskedBlueprint, Part
from seriatim.interop.chat import ChatTemplate, read_template
from seriatim.interop.export import Publication, published_tensors
from seriatim.interop.families import blueprint
from seriatim.interop.families.diffullama import mask_of_gpt2
from seriatim.interop.fields import read_config
from seriatim.interop.gguf import GGUF
from seriatim.interop.tokenizer import published_tokenizer
from seriatim.interop.weights import as_trained, load_into, opened
from seriatim.model import Model
from seriatim.systems.language_model import LanguageModel
from seriatim.systems.meta import Meta
from seriatim.systems.system import Sampling, System

WINDOW = 1024  # tokens that are scored together, however long a text the model takes


class Published(LanguageModel):
    """A language model that somebody published, in our parts. `config` is its blueprint, `raw` its config.json,
    `settings` its generation_config.json, `chat` its template of conversations (None: it has none)."""

    validation_size = 16  # windows of a thousand tokens, each time a training looks at them

    def __init__(
        self, plan: Blueprint, model: Model, tokenizer: Any, raw: dict[str, Any], settings: dict[str, Any],
        chat: ChatTemplate | None = None,
    ):  # fmt: skip
        nn.Module.__init__(self)
        self.config, self.model, self.raw, self.settings, self.chat = plan, model, raw, settings, chat
        name = raw["model_type"]
        self.__dict__["tokenizer"] = tokenizer
        self.meta = Meta(name, name, "text", "text", "", "exact", f"A published model of type {name}.")  # type: ignore[misc]
        said = {
            k: settings[k]
            for k in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
            if settings.get(k) is not None
        }
        said |= {} if settings.get("do_sample") else {"temperature": 0.0}
        self.sampling = Sampling(**said)  # type: ignore[misc]

    @property
    def stop(self) -> tuple[int, ...]:
        eos = self.settings.get("eos_token_id")
        return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)

    @property
    def window(self) -> int:
        return min(self.config.length, WINDOW)

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.config.parts

    def publication(self) -> Publication:
        tensors = published_tensors(self.model.state_dict(), self.parts, self.config.backbone)
        return Publication(self.raw, tensors, self.settings)


def load_published(place: str | Path, dtype: torch.dtype | None = None) -> Any:
    """The model of a folder with config.json and safetensors, or of a GGUF file, in evaluation mode, in `dtype` (None:
    as stored; of a GGUF file, dequantised to float32): a `Published`, or a `PublishedMasked` where it decides masks.

    Without files of a tokenizer it works on ids. Raises FileNotFoundError, ValueError that says what is missing,
    unexpected or not understood.
    """
    place = Path(place)
    if place.suffix == ".gguf":
        file = GGUF(place)
        return _put_together(file.config, file.files, file.tokenizer, file.settings, file.chat, place, dtype)
    raw = read_config(place)
    settings = {"eos_token_id": raw.get("eos_token_id")} | _settings(place / "generation_config.json")
    with opened(place) as files:
        return _put_together(raw, files, published_tokenizer(place), settings, read_template(place), place, dtype)


def _put_together(
    raw: dict[str, Any], files: Mapping[str, Any], tokenizer: Any, settings: dict[str, Any],
    chat: ChatTemplate | None, place: Path, dtype: torch.dtype | None,
) -> System:  # fmt: skip
    raw = mask_of_gpt2(raw, files)
    plan = blueprint(raw, str(place if place.is_file() else place / "config.json"))
    plan = as_trained(plan, files)
    with torch.device("meta"):
        model = plan.build()
    load_into(model, plan, files, place, dtype)
    kind: Any = Published
    if isinstance(plan, EncoderDecoderBlueprint):
        from seriatim.systems.encoder_decoder import EncoderDecoder as kind  # builds on this file
    elif isinstance(plan, MaskedBlueprint):
        from seriatim.systems.published_masked import PublishedMasked as kind
    return kind(plan, model, tokenizer, raw, settings, chat).eval().requires_grad_(False)


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from None
    return {k: v for k, v in said.items() if v is not None} if isinstance(said, dict) else {}
