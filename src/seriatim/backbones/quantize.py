"""Products with weight matrices in the formats they are kept in: floating point, 8-bit and 4-bit integers.

Weights only: activations stay as they are. One row at a time is what generation computes; there the time is that of
reading the weights, which fewer bits make shorter. Where a step is compiled, products of one row are written as sums,
which the compiler turns into loops that read weights two to three times as fast as torch's bfloat16 product does.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

INT8_ROWS = 8  # more rows than that are faster through a product in floating point
COLUMNS = 16  # that torch's 8-bit product reads at once: it reads beyond a row of another length
CHUNK = 4096  # rows that are converted at a time: a large matrix is never whole in float32
GROUP = 32  # 4-bit numbers that share a scale and a zero
ROWS = 16  # that torch's 4-bit product takes together


def linear(x: Float[Tensor, "*rest i"], weight: Any, bias: Tensor | None = None) -> Float[Tensor, "*rest o"]:
    """x @ weight.T + bias, whatever the format of the weight."""
    if isinstance(weight, tuple):
        return weight.times(x, bias)  # type: ignore[attr-defined]
    if torch.compiler.is_compiling() and _one_row(x):
        y = (weight.float() * x.float().view(1, -1)).sum(-1).to(x.dtype).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias
    return F.linear(x, weight, bias)


def _one_row(x: Tensor) -> bool:
    return x.is_cpu and x.numel() == x.shape[-1] and not x.requires_grad and x.dtype != torch.float64


class Int8(NamedTuple):
    """Each row of a matrix (outputs, inputs) as integers from -127 to 127, times a scale."""

    weight: Int[Tensor, "o i"]
    scale: Float[Tensor, "o"]

    @staticmethod
    def of(matrix: Float[Tensor, "o i"]) -> Int8:
        """The nearest such matrix."""
        scale = (matrix.abs().amax(1).float() / 127).clamp(min=1e-12).to(matrix.dtype)
        number = torch.empty(matrix.shape, dtype=torch.int8, device=matrix.device)
        for rows, kept, of in zip(number.split(CHUNK), matrix.split(CHUNK), scale.split(CHUNK), strict=True):
            rows.copy_((kept.float() / of.float()[:, None]).round().clamp(-127, 127))
        return Int8(number, scale)

    def rows(self, ids: Int[Tensor, "n"]) -> Int8:
        """Some rows of the matrix."""
        return Int8(self.weight[ids], self.scale[ids])

    def times(self, x: Float[Tensor, "*rest i"], bias: Tensor | None = None) -> Float[Tensor, "*rest o"]:
        """x @ matrix.T + bias."""
        y = self._product(x)
        return y if bias is None else y + bias

    def _product(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and _one_row(x):
            y = (self.weight.float() * x.float().view(1, -1)).sum(-1) * self.scale.float()
            return y.to(x.dtype).view(*x.shape[:-1], -1)
        rows = x.numel() // x.shape[-1]
        if x.is_cpu and rows <= INT8_ROWS and x.dtype == self.scale.dtype and not x.shape[-1] % COLUMNS:
            return torch.ops.aten._weight_int8pack_mm(x.reshape(rows, -1), self.weight, self.scale).view(
                *x.shape[:-1], -1
            )
        return F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)  # integers up to 256 are exact in bfloat16


class Int4(NamedTuple):
    """A matrix (outputs, inputs) as integers from 0 to 15, `GROUP` of a row sharing a scale and a zero: number times
    scale, plus the middle of the group.

    packed: on a CPU as torch's own product takes it, elsewhere two numbers a byte.
    """

    packed: Int[Tensor, "o i2"]
    scales: Float[Tensor, "groups o 2"]  # scale and middle

    @staticmethod
    def of(matrix: Float[Tensor, "o i"]) -> Int4:
        """The nearest such matrix. Raises ValueError where a row does not divide into groups."""
        if matrix.shape[1] % GROUP or matrix.shape[0] % ROWS:
            raise ValueError(
                f"4-bit weights need rows in groups of {GROUP}, {ROWS} at a time; got {tuple(matrix.shape)}"
            )
        parts = matrix.float().unflatten(1, (-1, GROUP))
        low, high = parts.amin(2), parts.amax(2)
        scale = ((high - low) / 15).clamp(min=1e-12).to(matrix.dtype)
        middle = (low + 8 * scale.float()).to(matrix.dtype)
        number = ((parts - middle.float()[..., None]) / scale.float()[..., None]).round().clamp(-8, 7) + 8
        number = number.flatten(1).to(torch.int32)
        scales = torch.stack([scale.T, middle.T], -1).contiguous()
        if matrix.is_cpu:
            return Int4(torch.ops.aten._convert_weight_to_int4pack_for_cpu(number, 1), scales)
        return Int4((number[:, ::2] | number[:, 1::2] << 4).to(torch.uint8), scales)

    def times(self, x: Float[Tensor, "*rest i"], bias: Tensor | None = None) -> Float[Tensor, "*rest o"]:
        """x @ matrix.T + bias."""
        y = self._product(x)
        return y if bias is None else y + bias

    def _product(self, x: Tensor) -> Tensor:
        if x.is_cpu:
            flat, scales = x.reshape(-1, x.shape[-1]), self.scales.to(x.dtype)
            return torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed, GROUP, scales).view(*x.shape[:-1], -1)
        return F.linear(x, self._unpacked().to(x.dtype))

    def _unpacked(self) -> Float[Tensor, "o i"]:
        number = torch.stack([self.packed & 15, self.packed >> 4], -1).flatten(1).float() - 8
        scale, middle = self.scales.float().permute(2, 1, 0)
        return (number.unflatten(1, (-1, GROUP)) * scale[..., None] + middle[..., None]).flatten(1)


def packs() -> bool:
    """Whether this processor multiplies bfloat16, and torch can lay weights out for it."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Packed(NamedTuple):
    """A matrix (outputs, inputs) as it is, laid out once for the processor's product, which otherwise does so at every
    call: the same results, 1.3 times as fast for one row and 1.6 times for 8 to 16."""

    weight: Tensor  # opaque; bfloat16, of the matrix's shape

    @staticmethod
    def of(matrix: Float[Tensor, "o i"]) -> Packed:
        """Raises ValueError unless it is in bfloat16, on a processor that multiplies that."""
        if not (matrix.is_cpu and packs()):
            raise ValueError("weights are packed for processors that multiply bfloat16, and this is none")
        if matrix.dtype != torch.bfloat16:
            raise ValueError(f"weights are packed in bfloat16, and these are {matrix.dtype}: load the model in that")
        return Packed(torch.ops.mkldnn._reorder_linear_weight(matrix, 1))

    def rows(self, ids: Int[Tensor, "n"]) -> Packed:
        """Some rows of the matrix."""
        unit = torch.eye(self.weight.shape[1], dtype=torch.bfloat16)
        return Packed.of(self.times(unit).T[ids].contiguous())

    def times(self, x: Float[Tensor, "*rest i"], bias: Tensor | None = None) -> Float[Tensor, "*rest o"]:
        """x @ matrix.T + bias."""
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), self.weight, bias, "none", [], "")


Format = type[Int8] | type[Int4] | type[Packed]
FORMATS: dict[str, Format] = {"packed": Packed, "int8": Int8, "int4": Int4}


class Quantizable(nn.Module):
    """A module some of whose matrices may be kept in another format: `quantized` gives them as the products take
    them."""

    matrices: tuple[str, ...] = ()  # names of those

    def __init__(self) -> None:
        super().__init__()
        self._formats: dict[str, Format] = {}
        self._ready: dict[str, Any] | None = None

    def keep_as(self, name: str, kind: Format) -> None:
        """Keep one matrix in this format from now on; its parameter is given up."""
        matrix: Tensor = getattr(self, name)
        parts = kind.of(matrix.detach())
        setattr(self, name, None)
        for i, part in enumerate(parts):
            self.register_buffer(f"{name}_{i}", part, persistent=kind is not Packed)  # no other machine reads that
        self._formats[name], self._ready = kind, None

    def quantized(self) -> dict[str, Any]:
        """All weights by name."""
        if self._ready is None:
            self._ready = dict(self._parameters)
            for name, kind in self._formats.items():
                self._ready[name] = kind(*(getattr(self, f"{name}_{i}") for i in range(len(kind._fields))))
        return self._ready

    def __deepcopy__(self, memo: dict[int, Any]) -> Quantizable:
        """Packed matrices, which nothing can change nor copy, are shared."""
        memo.update((id(b), b) for b in self._buffers.values() if b is not None and b.is_mkldnn)
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        self._ready = None  # moved or cast
        return super()._apply(fn, recurse)


def is_rounded(model: nn.Module) -> bool:
    """Whether matrices are kept as integers."""
    kinds = {kind for p in model.modules() if isinstance(p, Quantizable) for kind in p._formats.values()}
    return bool(kinds - {Packed})


def refuse_packed(part: nn.Module) -> None:
    """Raises ValueError where matrices are laid out for the processor, which the compiler cannot read."""
    if any(Packed in p._formats.values() for p in part.modules() if isinstance(p, Quantizable)):
        raise ValueError("packed weights are for steps that are not compiled: keep them as they are, or as int8")


def quantize(model: nn.Module, name: str) -> None:
    """Keep the matrices of layers and heads as "int8" or "int4", or the same numbers "packed", in place; for generation
    only.

    4 bits are for layers: what reads out the vocabulary, and matrices whose rows do not divide into groups, get 8.
    Embeddings, norms and experts stay as they are. Raises ValueError for another format, one that the numbers or the
    machine do not suit, or a model without such parts.
    """
    if name not in FORMATS:
        raise ValueError(f"weights are kept as {', '.join(FORMATS)}, got {name!r}")
    parts = [part for part in model.modules() if isinstance(part, Quantizable)]
    many = [(part, n) for part in parts for n in part.matrices if isinstance(getattr(part, n), Tensor)]
    flat = [(part, n) for part, n in many if getattr(part, n).dim() == 2]
    if len({id(part) for part, _ in flat}) < 2:
        raise ValueError("this model has no layers whose weights can be kept in another format")
    for part, n in flat:
        rows, columns = getattr(part, n).shape
        fits = name != "int4" or (len(part.matrices) > 1 and not columns % GROUP and not rows % ROWS)
        part.keep_as(n, FORMATS[name] if fits else Int8)
