"""A published language model from its folder: config, weights, tokenizer, and how it wants to be sampled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seriatim.interop.blueprint import Blueprint
from seriatim.interop.families import blueprint
from seriatim.interop.fields import read_config
from seriatim.interop.tokenizer import published_tokenizer
from seriatim.interop.weights import load_into
from seriatim.model import Model
from seriatim.systems.language_model import LanguageModel
from seriatim.systems.meta import Meta
from seriatim.systems.system import Sampling


class Published(LanguageModel):
    """A language model that somebody published, in our parts. `config` is its blueprint; `settings` what its
    generation_config.json says."""

    def __init__(self, plan: Blueprint, model: Model, tokenizer: Any, name: str, settings: dict[str, Any]):
        nn.Module.__init__(self)
        self.config, self.model, self.settings = plan, model, settings
        self.__dict__["tokenizer"] = tokenizer
        self.meta = Meta(name, name, "text", "text", "", "exact", f"A published model of type {name}.")  # type: ignore[misc]
        said = {k: settings[k] for k in ("temperature", "top_k", "top_p", "min_p") if settings.get(k) is not None}
        said |= {} if settings.get("do_sample") else {"temperature": 0.0}
        self.sampling = Sampling(**said)  # type: ignore[misc]

    @property
    def stop(self) -> tuple[int, ...]:
        eos = self.settings.get("eos_token_id")
        return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)


def load_published(folder: str | Path, dtype: torch.dtype | None = None) -> Published:
    """The model of a folder with config.json and safetensors, in evaluation mode, in `dtype` (None: as stored).

    Without files of a tokenizer it works on ids. Raises FileNotFoundError, ValueError that says what is missing,
    unexpected or not understood.
    """
    folder = Path(folder)
    raw = read_config(folder)
    plan = blueprint(raw, str(folder / "config.json"))
    with torch.device("meta"):
        model = plan.build()
    load_into(model, plan, folder, dtype)
    settings = {"eos_token_id": raw.get("eos_token_id")} | _settings(folder / "generation_config.json")
    system = Published(plan, model, published_tokenizer(folder), raw["model_type"], settings)
    return system.eval().requires_grad_(False)


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from None
    return {k: v for k, v in said.items() if v is not None} if isinstance(said, dict) else {}
