"""The state of a training as one safetensors file: trained weights, averaged weights, moments, and where it stands.

One file, written beside and renamed, so that a kill at any moment leaves the old state or the new one. Randomness and
data position are not in it: those of step n follow from the seed and n.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def write_safely(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Tensors and facts about them, beside and renamed; a failed write leaves what was there. Raises OSError."""
    part = path.with_name(path.name + ".part")
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, part, {"about": json.dumps(about)})
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        part.chmod(0o666 & ~_umask())  # the library makes files that only the owner may read
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise OSError(
            f"{path} could not be written ({error}); what was there before is kept. Free some space, or choose another "
            "folder, and go on with --resume"
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_safely(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_safely` wrote. Raises ValueError where the file is cut short or is something else."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); it may have been cut short") from None
    if not isinstance(about, dict):
        raise ValueError(f"{path} holds tensors, but not the state of a training")
    return tensors, about


def gather(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and moments by name, whole on the first process and none on others; shared weights once."""
    weights, moments = _both(model, optimizer, WHOLE)
    tensors: dict[str, Tensor] = {f"model.{k}": v for k, v in _once(weights).items()}
    for name, entry in moments.get("state", {}).items():
        tensors |= {f"optimizer.{name}.{k}": torch.as_tensor(v) for k, v in entry.items()}
    return tensors


def frozen_names(model: nn.Module) -> set[str]:
    """What `gather` calls the parameters that are not trained."""
    named = model.named_parameters(remove_duplicate=False)
    return {f"model.{name.removeprefix('module.')}" for name, p in named if not p.requires_grad}


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Weights and moments back in place; frozen parameters stay. Raises ValueError for those of another model."""
    weights, moments = _both(model, optimizer, StateDictOptions(full_state_dict=True))
    frozen = frozen_names(model)
    want = {f"model.{k}" for k in _once(weights)} - frozen
    got = {k for k in tensors if k.startswith("model.")} - frozen
    if want != got:
        some = sorted(want ^ got)[:3]
        raise ValueError(f"{where} belongs to another model: it differs in {', '.join(some)}")
    new = {}
    for name, old in weights.items():
        new[name] = tensors.get(f"model.{name}", old)
        if new[name].shape != old.shape:
            raise ValueError(f"{where} belongs to another model: {name} has shape {tuple(new[name].shape)} there")
    twins = {id_: name for name, id_ in _identity(weights).items() if f"model.{name}" in tensors}
    for name, id_ in _identity(weights).items():  # a shared weight is stored once
        if f"model.{name}" not in tensors:
            new[name] = new[twins.get(id_, name)]
    state: dict[str, Any] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            name, _, part = key.removeprefix("optimizer.").rpartition(".")
            state.setdefault(name, {})[part] = value
    set_state_dict(
        model,
        optimizer,
        model_state_dict=new,
        optim_state_dict={"state": state, "param_groups": moments["param_groups"]},
        options=WHOLE,
    )


def _both(model: nn.Module, optimizer: torch.optim.Optimizer, options: StateDictOptions) -> tuple[Any, Any]:
    return get_state_dict(model, optimizer, options=options)


def _identity(weights: Mapping[str, Any]) -> dict[str, int]:
    return {name: x.data_ptr() if x.numel() else id(x) for name, x in weights.items()}


def _once(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Without the further names of what is shared."""
    seen: set[int] = set()
    out = {}
    for name, identity in _identity(weights).items():
        if identity not in seen:
            seen.add(identity)
            out[name] = weights[name]
    return out
