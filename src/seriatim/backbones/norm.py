"""Norms of vectors, by the kernels that are fast for their size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

SMALL = 12_288  # numbers; up to here the passes of a kernel cost more than the numbers


def rms_norm(x: Float[Tensor, "*rest d"], weight: Float[Tensor, "d"] | None, eps: float) -> Float[Tensor, "*rest d"]:
    """Divide vectors by their root mean square (Zhang & Sennrich 2019).

    On a CPU torch's own takes some seven passes, a tenth of the time of a small model's step; layer norm takes one, and
    of a vector beside its negative, whose mean is zero, it is the same.
    """
    d = x.shape[-1]
    if weight is not None and weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        return rms_norm(x.to(weight.dtype), weight, eps).to(x.dtype)  # weights too fine for the format of the rest
    if not x.is_cpu or x.numel() > SMALL or torch.compiler.is_compiling():
        return torch.rms_norm(x, (d,), weight, eps)
    y = torch.layer_norm(torch.cat((x, -x), -1), (2 * d,), None, None, eps).narrow(-1, 0, d)
    return y if weight is None else y * weight


def normalise(kind: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The norm of that kind, "rms" or "layer"."""
    if kind == "rms":
        return rms_norm(x, weight, eps)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
