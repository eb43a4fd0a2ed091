"""Heads with one softmax a read-out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from seriatim.backbones.quantize import Quantizable, linear, refuse_packed
from seriatim.canvas import Canvas
from seriatim.compiling import compiled
from seriatim.heads.dist import Categorical
from seriatim.initial import drawn
from seriatim.plan import Reads
from seriatim.random import Key, Random


class CategoricalHead(Quantizable):
    """A linear map to logits, or the embedding table itself (`tied`). Several roles (predictors that look in different
    directions) have a matrix each; where several slots read one element their logits are averaged. `softcap` bounds
    logits, smoothly (Gemma 2, arXiv 2408.00118)."""

    matrices = ("weight",)  # that `quantize` may keep as integers
    exact = True  # log_prob is the model's own
    continuous = False
    value_shape: tuple[int, ...] = ()

    def __init__(
        self, width: int, vocab: int, roles: int = 1, tied: nn.Parameter | None = None, bias: bool = False,
        softcap: float | None = None,
    ):  # fmt: skip
        super().__init__()
        if vocab < 1 or roles < 1:
            raise ValueError(f"a head predicts at least 1 id in at least 1 role, got {vocab} ids in {roles} roles")
        if tied is not None and tuple(tied.shape) != (roles * vocab, width):
            raise ValueError(f"a tied table must be ({roles * vocab}, {width}), got {tuple(tied.shape)}")
        self.width, self.vocab, self.roles, self.softcap = width, vocab, roles, softcap
        self._compiled: Callable[..., Tensor] | None = None
        self._compiled_logits: Callable[..., Tensor] | None = None
        self.weight = tied if tied is not None else nn.Parameter(drawn(roles * vocab, width))
        self.bias = nn.Parameter(torch.zeros(roles * vocab)) if bias else None

    def logits(self, h: Float[Tensor, "b m d"], reads: Reads | None = None) -> Float[Tensor, "b m v"]:
        weight = self.quantized()["weight"] if self._formats else self.weight
        said = self._said if self._compiled_logits is None or torch.is_grad_enabled() else self._compiled_logits
        x = said(h, weight, self.bias)
        if self.roles > 1:
            if reads is None or reads.role is None:
                raise ValueError(f"this head has {self.roles} roles; the plan's reads must say which one reads what")
            role = reads.role.clamp(min=0).to(h.device).expand(x.shape[0], -1)[..., None, None]
            x = x.unflatten(-1, (self.roles, self.vocab))
            x = x.gather(2, role.expand(-1, -1, 1, self.vocab))[:, :, 0]
        return x

    def _said(self, h: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        rows = h.reshape(-1, h.shape[-1])  # a slice of slots would be a product of batches, which copies the weight
        x = linear(rows, weight, bias).view(*h.shape[:-1], -1)
        return x if self.softcap is None else torch.tanh(x / self.softcap) * self.softcap

    def compile_decoding(self) -> None:
        """Compile the logits. Raises ValueError where weights are packed."""
        refuse_packed(self)
        self._compiled_logits = compiled(self._said)

    def limited(self, ids: Int[Tensor, "n"] | None = None) -> CategoricalHead:
        """This head for some ids only, in this order (None: all, by the very same weights): frozen rows of its matrix
        in their number format, of which decoding compiles nothing. Raises ValueError where there are several roles."""
        if self.roles > 1:
            raise ValueError(f"a head of {self.roles} roles cannot be limited to some ids")
        with torch.device("meta"):
            made = CategoricalHead(self.width, self.vocab if ids is None else len(ids), softcap=self.softcap)
        made._formats = dict(self._formats)
        made._parameters = {n: p if p is None or ids is None else _frozen(p[ids]) for n, p in self._parameters.items()}
        made._buffers = dict(self._buffers)
        if ids is not None and self._formats:
            made._buffers = {f"weight_{i}": part for i, part in enumerate(self.quantized()["weight"].rows(ids))}
        return made

    def dist(self, h: Float[Tensor, "b m d"], reads: Reads | None, canvas: Canvas) -> Categorical:
        return Categorical(self.logits(h, reads))

    def loss(
        self,
        h: Float[Tensor, "b m d"],
        reads: Reads | None,
        value: Int[Tensor, "b m"],
        random: Random | None = None,
        key: Key | None = None,
    ) -> Float[Tensor, "b m"]:
        """Cross-entropy of each read-out, in nats; involves no randomness."""
        if self._compiled is not None and self.training:
            return self._compiled(h, reads, value)
        return self._loss(h, reads, value)

    def compile_training(self) -> None:
        """Compile the loss: logits are large and made only to be summed up."""
        self._compiled = torch.compile(self._loss)

    def _loss(self, h: Float[Tensor, "b m d"], reads: Reads | None, value: Int[Tensor, "b m"]) -> Float[Tensor, "b m"]:
        x = self.logits(h, reads)
        x = x if x.dtype == torch.float64 else x.float()
        return F.cross_entropy(x.flatten(0, 1), value.flatten(), reduction="none").view(value.shape)


def _frozen(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x.detach(), requires_grad=False)
