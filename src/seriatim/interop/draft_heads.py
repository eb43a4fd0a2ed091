"""Parts that somebody published for somebody's model, as our draft parts: the files of Medusa, Hydra, EAGLE, Chimera.

Such a folder has a config.json and medusa_lm_head.safetensors or .pt, or hydra_lm_head.pt, or EAGLE's model.safetensors
or pytorch_model.bin, or Chimera's three files. They name their base and carry no fingerprint of it: sizes are compared,
and nothing more can be. A .pt or .bin file is a pickle, and is read only where the user asks for it, as weights and
nothing else.

The released blocks of a head are one module repeated; its file has it under each of its names, so ours, which differ,
become equal.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from seriatim.interop.feature_drafts import read_chimera, read_eagle
from seriatim.posttraining.drafting import Base, DraftPart, ready
from seriatim.posttraining.heads import Hydra, HydraConfig, Medusa, MedusaConfig

FILES = {
    "medusa": ("medusa_lm_head.safetensors", "medusa_lm_head.pt"),
    "hydra": ("hydra_lm_head.safetensors", "hydra_lm_head.pt"),
    "eagle-2": ("model.safetensors", "pytorch_model.bin"),
    "chimera": ("trimlp.safetensors", "trimlp.pt"),
}
BESIDE = {"chimera": ("trimlp", "fast_layer1", "chimera_head")}  # files that make up a part together


def published_heads(folder: str | Path, key: str) -> Path | None:
    """The file of heads of this kind that a folder holds, a safe one before a pickle; None: there is none."""
    names = FILES.get(key, ())
    return next((Path(folder) / name for name in names if (Path(folder) / name).is_file()), None)


def load_published_heads(file: Path, base: Base, key: str, pickled: bool = False) -> DraftPart:
    """Published heads in the base's number format. Raises ValueError where they do not fit, or are a pickle and
    `pickled` was not said; FileNotFoundError where config.json or a file that belongs to them is missing."""
    config, tensors = _config(file.parent), _all_tensors(file, key, pickled)
    named = config.get("base_model_name_or_path", "another model")
    read = {"medusa": _medusa, "hydra": _hydra, "eagle-2": read_eagle, "chimera": read_chimera}[key]
    try:
        part, ours = read(config, tensors, base)
        own = dict(part.named_parameters())
        wrong = [n for n, x in ours.items() if n not in own or own[n].shape != x.shape]
        if wrong or own.keys() - ours.keys():
            name = (wrong or sorted(own.keys() - ours.keys()))[0]
            raise ValueError(f"{name} is {_shape(ours.get(name))} there and {_shape(own.get(name))} for this base")
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{file} (heads of {named}) does not fit {base}: {error}") from None
    part.load_state_dict(ours, strict=False)
    return ready(part, base)


def _shape(x: Tensor | None) -> str:
    return "missing" if x is None else str(tuple(x.shape))


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has heads and no config.json, which says what they are; put it beside them")
    return json.loads(path.read_text(encoding="utf-8"))


def _all_tensors(file: Path, key: str, pickled: bool) -> dict[str, Tensor]:
    """Of a file; where several make up a part, of all of them, each name after that of its file."""
    if key not in BESIDE:
        return _tensors(file, pickled)
    tensors: dict[str, Tensor] = {}
    for stem in BESIDE[key]:
        part = file.with_name(stem + file.suffix)
        if not part.is_file():
            raise FileNotFoundError(
                f"{file} needs {part.name} beside it: {key} is published as {len(BESIDE[key])} files"
            )
        tensors |= {f"{stem}.{name}": x for name, x in _tensors(part, pickled).items()}
    return tensors


def _tensors(file: Path, pickled: bool) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is not a whole safetensors file ({error}); it may have been cut short") from None
    if not pickled:
        raise ValueError(
            f"{file} is a pickle, which can hold programs: it is read only on demand (+pickled=true), and then as "
            "tensors alone"
        )
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} does not hold tensors alone, or was cut short: {error}") from None


def _medusa(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base
) -> tuple[DraftPart, dict[str, Tensor]]:
    """`{head}.{block}.linear`, and `{head}.{blocks}.weight` where heads read out by matrices of their own. How many
    there are follows from the file: configs are known that say otherwise."""
    heads = 1 + max(int(name.split(".")[0]) for name in tensors)
    layers = sum(name.startswith("0.") and name.endswith("linear.weight") for name in tensors)
    own = f"0.{layers}.weight" in tensors
    part = Medusa(MedusaConfig(heads=heads, layers=layers, own_output=own), base)
    each = range(heads)
    ours = {
        "blocks": torch.stack([torch.stack([tensors[f"{i}.{j}.linear.weight"] for i in each]) for j in range(layers)]),
        "bias": torch.stack([torch.stack([tensors[f"{i}.{j}.linear.bias"] for i in each]) for j in range(layers)]),
    }
    if own:
        ours["output.weight"] = torch.stack([tensors[f"{i}.{layers}.weight"] for i in each])
        ours["output.bias"] = torch.zeros(ours["output.weight"].shape[:2])
    return part, ours


def _hydra(config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base) -> tuple[DraftPart, dict[str, Tensor]]:
    """`hydra_mlp.{head}.{block}`, `hydra_lm_head.{head}`, and a Llama of one layer in front (`prefix_embeding_layer`)
    in the variant with dropout between the blocks."""
    kind = config.get("hydra_head_arch", "mlp")
    if kind not in ("mlp", "prefix-mlp") or not config.get("grounded_heads", True):
        what = kind if kind not in ("mlp", "prefix-mlp") else "heads that do not see what was drafted"
        raise ValueError(f"Hydra's variant {what} is not known here; mlp and prefix-mlp that see it are")
    prefix = kind == "prefix-mlp"
    step, end = (2, ".1") if prefix else (1, "")  # dropout stands before each block, and before the matrix
    heads = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("hydra_lm_head."))
    layers = int(config.get("hydra_num_layers", 1))
    part = Hydra(HydraConfig(heads=heads, layers=layers, own_output=True, prefix=prefix, distill=prefix), base)

    def block(i: int, j: int, name: str) -> Tensor:
        return tensors[f"hydra_mlp.{i}.{step * j + step - 1}.{name}"]

    ours: dict[str, Tensor] = {}
    for i in range(heads):
        ours[f"first.{i}"] = torch.cat([block(i, 0, "res_connection.weight"), block(i, 0, "linear.weight")])
    both = [torch.cat([block(i, 0, "res_connection.bias"), block(i, 0, "linear.bias")]) for i in range(heads)]
    ours["first_bias"] = torch.stack(both)
    for mine, name in (("blocks", "linear.weight"), ("bias", "linear.bias")) if layers > 1 else ():
        ours[mine] = torch.stack([torch.stack([block(i, j, name) for j in range(1, layers)]) for i in range(heads)])
    ours["output.weight"] = torch.stack([tensors[f"hydra_lm_head.{i}{end}.weight"] for i in range(heads)])
    ours["output.bias"] = torch.stack([tensors[f"hydra_lm_head.{i}{end}.bias"] for i in range(heads)])
    if prefix:
        ours |= _llama_layer(tensors)
    return part, ours


def _llama_layer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layer in front of Hydra++'s heads, and the norm behind it, as ours has them."""

    def of(name: str) -> Tensor:
        return tensors[f"prefix_embeding_layer.{name}.weight"]

    layer = "layers.0."
    qkv = [of(f"{layer}self_attn.{x}_proj") for x in "qkv"]
    up = [of(f"{layer}mlp.{x}_proj") for x in ("gate", "up")]
    ours = {
        "norm1": of(layer + "input_layernorm"), "norm2": of(layer + "post_attention_layernorm"),
        "qkv": torch.cat(qkv), "out": of(layer + "self_attn.o_proj"), "up": torch.cat(up),
        "down": of(layer + "mlp.down_proj"),
    }  # fmt: skip
    return {f"prefix.layers.0.{name}": x for name, x in ours.items()} | {"prefix_norm": of("norm")}
