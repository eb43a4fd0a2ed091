"""Adapters in the format of the PEFT library: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from seriatim.interop.blueprint import Part
from seriatim.interop.families import CONVERTED
from seriatim.posttraining.lora import Factors, LoRA, module_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# how an adapter was trained, or how it is told to PEFT: nothing that changes what it adds
HARMLESS = frozenset({
    CONVERTED,  # is followed by who loads the base
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "init_lora_weights",
    "use_rslora", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "megatron_core",
    "runtime_config", "qalora_group_size", "eva_config", "loftq_config", "ensure_weight_tying", "lora_ga_config",
})  # fmt: skip
# ways to begin that change the base model, too: what was saved fits another base than the one it names
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Adapter(NamedTuple):
    """What a folder holds: the base model it names ("" if none), and factors by published matrix."""

    base: str
    factors: dict[str, Factors]


def read_adapter(folder: Path) -> Adapter:
    """An adapter. Raises ValueError, FileNotFoundError that say what is missing or not understood."""
    config = _config(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = " (adapter_model.bin is a pickle, which runs any code it likes: save it as safetensors)"
        raise FileNotFoundError(
            f"{folder} holds no {WEIGHTS}" + (pickled if (folder / "adapter_model.bin").is_file() else "")
        )
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); it may have been cut short") from None
    halves: dict[str, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        module, _, half = name.removesuffix(".weight").rpartition(".")
        if not name.startswith(PREFIX) or half not in ("lora_A", "lora_B") or not x.is_floating_point():
            raise ValueError(f"{path} holds {name}, which is not understood: adapters of matrices by LoRA are")
        halves.setdefault(module.removeprefix(PREFIX), {})[half] = x.float()
    lone = [module for module, both in halves.items() if len(both) < 2]
    if lone or not halves:
        raise ValueError(f"{path} holds half an adapter of {lone[0]}" if lone else f"{path} holds no adapter")
    scales = _scales(config, {module: both["lora_A"].shape[0] for module, both in halves.items()}, folder / CONFIG)
    factors = {module: Factors(both["lora_A"], both["lora_B"], scales[module]) for module, both in halves.items()}
    return Adapter(str(config.get("base_model_name_or_path") or ""), factors)


def conversion_of(folder: Path) -> dict[str, Any] | None:
    """How the model that an adapter was learned on decides masks; None for one of a next-token model."""
    return _config(folder).get(CONVERTED)


def base_of(folder: Path) -> str:
    """The base model that an adapter names, "" if none. Raises ValueError for a config that is none."""
    return str(_config(folder).get("base_model_name_or_path") or "")


def _config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, its keys understood. Raises ValueError else."""
    path = folder / CONFIG
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} holds no {CONFIG}: it is no adapter") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error})") from None
    if not isinstance(said, dict) or str(said.get("peft_type", "")).upper() != "LORA":
        kind = said.get("peft_type") if isinstance(said, dict) else None
        raise ValueError(f"{path} is of an adapter of type {kind!r}; LORA is understood")
    begun = str(said.get("init_lora_weights", True)).lower()
    if begun.startswith(CHANGES_BASE):
        raise ValueError(
            f"{path}: init_lora_weights is {begun!r}, which changes the base model, too; save the adapter converted "
            "to plain LoRA (PEFT: path_initial_model_for_weight_conversion)"
        )
    plain: tuple[Any, ...] = (None, False, {}, [], "none")
    odd = [f"{k} = {str(v)[:60]}" for k, v in said.items() if k not in HARMLESS and v not in plain]
    if odd:
        raise ValueError(f"{path} has keys that are not understood and may change what is computed: {', '.join(odd)}")
    return said


def _scales(config: Mapping[str, Any], ranks: Mapping[str, int], where: Path) -> dict[str, float]:
    """Of each matrix: alpha over the rank, or its root (rank-stabilised, arXiv 2312.03732)."""
    alphas = config.get("alpha_pattern") or {}
    alpha = config.get("lora_alpha", 8)
    for value in (alpha, *(alphas.values() if isinstance(alphas, dict) else (None,))):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{where}: lora_alpha and those of alpha_pattern are numbers, got {value!r}")
    named = {key: [m for m in ranks if m == key or m.endswith("." + key)] for key in alphas}
    lost = [key for key, modules in named.items() if not modules]
    if lost:
        raise ValueError(f"{where}: alpha_pattern names {lost[0]!r}, which is the end of no adapted matrix's name")
    own = {
        module: alphas[key] for key, modules in reversed(named.items()) for module in modules
    }  # the first one counts
    root = bool(config.get("use_rslora"))
    return {m: own.get(m, alpha) / (math.sqrt(rank) if root else rank) for m, rank in ranks.items()}


def adapter_config(base: str, config: LoRA, parts: Sequence[Part], targets: Sequence[str]) -> dict[str, Any]:
    """What adapter_config.json says of an adapter of ours."""
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": config.rank,
        "lora_alpha": config.scale * config.rank, "target_modules": list(targets), "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": any(part.how == "columns" for part in parts), "inference_mode": True,
    }  # fmt: skip


def adapter_tensors(trained: Mapping[str, Tensor], parts: Sequence[Part]) -> dict[str, Tensor]:
    """Trained parameters of `lora.attach`, by their names in the model -> under PEFT's names."""
    out = {}
    for part in parts:
        owner, _, name = part.ours.rpartition(".")
        for module in map(module_of, part.theirs):
            for ours, theirs in (("a", "lora_A"), ("b", "lora_B")):
                key = f"{owner}.parametrizations.{name}.0.{ours}.{module.rpartition('.')[2]}"
                if key in trained:
                    out[f"{PREFIX}{module}.{theirs}.weight"] = trained[key].to(torch.float32)
    return out
