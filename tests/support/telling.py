"""Weights by which a mistake would show: the same on every machine, from the names and shapes of tensors alone."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

BUFFERS = ("inv_freq", "sampling_eps_min", "sampling_eps_max")  # stored, and read by nobody
OUTER = ("embed", "wte", "wpe", "lm_head", "transformer.ff_out", "output_layer.linear")
SHARP = ("q_proj", "k_proj", "qkv", "c_attn")


def numbers(name: str, count: int) -> Tensor:
    """Whole numbers below 2^32 that look random, by integer arithmetic."""
    x = torch.arange(count) * 2_654_435_761 + zlib.crc32(name.encode())
    for factor in (73_244_475, 73_244_475, 1):
        x = x & 0xFFFFFFFF
        x = ((x ^ (x >> 16)) * factor) & 0xFFFFFFFF
    return x


def normal(name: str, shape: Sequence[int]) -> Tensor:
    """Numbers of the standard normal law, in float32."""
    count = int(torch.tensor(shape).prod()) if shape else 1
    unit = (numbers(name, count).double() + 0.5) / 2**32
    return torch.special.ndtri(unit).float().reshape(tuple(shape))


def weights(tensors: Mapping[str, Sequence[int]], mask: int, outer: float = 0.8) -> dict[str, Tensor]:
    """Logits with a standard deviation of 2 to 5, scores that reach 5, no norm at 1 and no bias at 0. The head has no
    say on the mask, whose logit is 0."""
    out = {}
    for name, shape in tensors.items():
        z = normal(name, shape)
        if name.endswith(BUFFERS):
            z = z * 0
        elif len(shape) == 1:
            z = 0.3 * z + float("norm" in name and name.endswith("weight")) + float("ln_" in name and "weight" in name)
        elif any(part in name for part in OUTER):
            z = z * (outer if "output_layer" not in name else outer / 2)
            if "lm_head" in name or "transformer.ff_out" in name:
                z[mask] = 0
        else:
            z = z * (2.0 if any(part in name for part in SHARP) else 1.0) / shape[-1] ** 0.5
        out[name] = z
    return out


def hidden_text(vocab: int, rows: int = 3, length: int = 40) -> tuple[Tensor, Tensor]:
    """Ids, those of masks and ends not among them, and which half of them is hidden."""
    ids = 3 + numbers("ids", rows * length) % (vocab - 12)
    return ids.reshape(rows, length), (numbers("hidden", rows * length) % 2).bool().reshape(rows, length)
