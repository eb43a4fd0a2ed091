"""A published language model from its folder: config, weights, tokenizer, and how it wants to be sampled."""

from __future__ import annotations

from pathlib import Path

import torch

from seriatim.interop.families import blueprint
from seriatim.interop.fields import read_config
from seriatim.interop.weights import load_into
from seriatim.model import Model


def load_model(folder: str | Path, dtype: torch.dtype | None = None) -> Model:
    """The model of a folder with config.json and safetensors, in evaluation mode, in `dtype` (None: as stored).

    Raises FileNotFoundError, ValueError that says what is missing, unexpected or not understood.
    """
    folder = Path(folder)
    plan = blueprint(read_config(folder), str(folder / "config.json"))
    with torch.device("meta"):
        model = plan.build()
    load_into(model, plan, folder, dtype)
    return model.eval().requires_grad_(False)
