"""EAGLE's and Chimera's published layers as our draft parts (`draft_heads` finds and reads their files).

EAGLE: one file, as of a Llama of one layer that lacks its first norm, with `fc` in front; its config.json is that
Llama's. Chimera: trimlp, fast_layer1 and chimera_head, the layer with the base's sizes; its config.json counts the
heads. The base's embeddings, which EAGLE's file repeats, are taken from the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from seriatim.posttraining.chimera import Chimera, ChimeraConfig
from seriatim.posttraining.drafting import Base, DraftPart
from seriatim.posttraining.eagle import Eagle, EagleConfig


def read_eagle(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base
) -> tuple[DraftPart, dict[str, Tensor]]:
    """EAGLE's layer, which EAGLE-2 shares, and its parameters. Raises KeyError, ValueError for something else."""
    if "d2t" in tensors or any(name.startswith("midlayer.") for name in tensors):
        raise ValueError("it is of EAGLE-3, which reads states of several layers; EAGLE's and EAGLE-2's are known here")
    if any(name.startswith("layers.1.") for name in tensors):
        raise ValueError("it has several layers; EAGLE's has one")
    if config.get("rope_scaling") is not None:
        raise ValueError(f"its rotary embedding is scaled ({config['rope_scaling']}), which is not known of EAGLE's")
    for name, here in {"vocab_size": base.vocab, "hidden_size": base.width}.items():
        if config[name] != here:
            raise ValueError(f"{name} is {config[name]:,} there and {here:,} here")
    heads = config["num_attention_heads"]
    part = Eagle(
        EagleConfig(
            hidden=config["intermediate_size"], heads=heads, kv_heads=config.get("num_key_value_heads", heads),
            theta=float(config.get("rope_theta", 10_000.0)), eps=config.get("rms_norm_eps", 1e-6),
            qkv_bias="layers.0.self_attn.q_proj.bias" in tensors, bias="fc.bias" in tensors,
        ),
        base,
    )  # fmt: skip
    ours = {"fuse": tensors["fc.weight"]} | _layer(tensors, "layers.0.", first_norm=False)
    if "fc.bias" in tensors:
        ours["fuse_bias"] = tensors["fc.bias"]
    return part, ours


def read_chimera(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base
) -> tuple[DraftPart, dict[str, Tensor]]:
    """Chimera's parts, and their parameters. Raises KeyError, ValueError for something else."""
    heads = sum(name.startswith("chimera_head.") for name in tensors)
    said = config.get("chimera_num_heads", heads)
    if heads != said:
        raise ValueError(f"it has {heads} heads, and its config.json says {said}")
    hidden = tensors["fast_layer1.0.mlp.gate_proj.weight"].shape[0]
    part = Chimera(ChimeraConfig(heads=heads, hidden=hidden, own_output=True), base)
    read = torch.cat([torch.stack(tensors[f"chimera_head.{i}.0.weight"].chunk(2, -1)) for i in range(heads)])
    ours = {
        "block": tensors["trimlp.0.linear.weight"], "block_bias": tensors["trimlp.0.linear.bias"],
        "narrow": tensors["trimlp.1.weight"], "output.weight": read, "output.bias": torch.zeros(read.shape[:2]),
    }  # fmt: skip
    return part, ours | _layer(tensors, "fast_layer1.0.")


def _layer(tensors: Mapping[str, Tensor], prefix: str, first_norm: bool = True) -> dict[str, Tensor]:
    """The parameters of a Llama layer as ours, in a part's `layer`."""

    def joined(*names: str, ending: str = ".weight") -> Tensor:
        return torch.cat([tensors[f"{prefix}{name}{ending}"] for name in names])

    qkv = [f"self_attn.{x}_proj" for x in "qkv"]
    ours = {
        "qkv": joined(*qkv), "out": joined("self_attn.o_proj"), "up": joined("mlp.gate_proj", "mlp.up_proj"),
        "down": joined("mlp.down_proj"), "norm2": joined("post_attention_layernorm"),
    }  # fmt: skip
    if first_norm:
        ours["norm1"] = joined("input_layernorm")
    if f"{prefix}{qkv[0]}.bias" in tensors:
        ours["qkv_bias"] = joined(*qkv, ending=".bias")
    return {f"layer.layers.0.{name}": x for name, x in ours.items()}
