"""In which number format a training multiplies: bfloat16 where the machine has instructions for it."""

from __future__ import annotations

import functools

import torch

from seriatim.processor import capabilities

NATIVE = ("avx512_bf16", "amx_bf16")  # by which x86 processors multiply it


@functools.cache
def why_not_bfloat16(device: str) -> str | None:
    """Why bfloat16 would be no gain on this kind of device; None where it may be one, or nothing is known. A processor
    without instructions for it takes two to three times as long as in float32."""
    has = capabilities()
    if device != "cpu" or not has:
        return None
    if has.get("architecture") != "x86_64" or any(has.get(name) for name in NATIVE):
        return None
    return f"{has.get('cpu_name', 'this processor')} has no instructions for bfloat16"


def autocast(device: str, bf16: bool) -> torch.autocast:
    """Products in bfloat16 where that is asked for and gains time on this kind of device, else as they stand."""
    return torch.autocast(device, torch.bfloat16, enabled=bf16 and why_not_bfloat16(device) is None)
