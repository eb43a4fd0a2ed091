"""A classifier steers what a masked model writes: p(x | y) in proportion to p(x) p(y | x)^w, for a model that never
heard of y.

Exactly, each unknown element needs the classifier once for each value that it may take. To first order one gradient
tells all: log p(y | x with v in place i) is about log p(y | x) + g_i . (vector(v) - vector of what stands there), g_i
the gradient at the vector in place i (CtrlDiff, 2025, arXiv 2505.14455; for continuous diffusion Dhariwal & Nichol
2021). It is added to the logits of what is read, which is unknown; what is known stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.heads.dist import Categorical


class Steer(Protocol):
    """Changes the law of what a forward reads. A value."""

    def __call__(self, dist: Any, element: Int[Tensor, "b m"] | int, canvas: Canvas) -> Any:
        """The law of these elements (-1: padding) instead of `dist`."""
        ...


class Classifier(Protocol):
    """Says how likely something is of a text that is known in part."""

    @property
    def table(self) -> Float[Tensor, "v d"]:
        """The vector of each value."""
        ...

    def vectors(self, ids: Int[Tensor, "b E"], known: Bool[Tensor, "b E"]) -> Float[Tensor, "b E d"]:
        """What stands in each place: a value's vector, or a mask's."""
        ...

    def log_prob(self, x: Float[Tensor, "b E d"]) -> Float[Tensor, "b c"]:
        """The log-probability of each class, in nats. Rows do not depend on each other."""
        ...


@dataclass(frozen=True, eq=False)
class Steering:
    """Towards class `label` (one for all rows, or one each), `weight` times as strongly as Bayes' rule says at 1.

    exact: by a call of the classifier for each value in each place, `at_once` rows of it together: a reference for few
    values. Neutral: a weight of 0.
    """

    classifier: Classifier
    label: int | Int[Tensor, "b"]
    weight: float = 1.0
    exact: bool = False
    at_once: int = 1024

    def __call__(self, dist: Any, element: Int[Tensor, "b m"] | int, canvas: Canvas) -> Any:
        if self.weight == 0:
            return dist
        if not isinstance(dist, Categorical) or not isinstance(element, Tensor):
            raise TypeError("a classifier steers tokens that are read in any order, each as one of so many values")
        element = element.expand(canvas.batch, -1)
        gain = (self._exactly if self.exact else self._roughly)(canvas, element, dist.logits.shape[-1])
        return Categorical(dist.logits + self.weight * gain.to(dist.logits))

    def _roughly(self, canvas: Canvas, element: Int[Tensor, "b m"], values: int) -> Float[Tensor, "b m v"]:
        """How much more likely the class is with each value in each place: by one gradient."""
        x = self._vectors(canvas)
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self._said(x).sum(), x)
        where = element.clamp(min=0).to(x.device)[..., None].expand(-1, -1, x.shape[-1])
        g, here = gradient.gather(1, where), x.detach().gather(1, where)
        return g @ self.classifier.table[:values].detach().T - (g * here).sum(-1, keepdim=True)

    @torch.inference_mode(False)  # what a classifier keeps for later must serve gradients, too
    @torch.no_grad()
    def _exactly(self, canvas: Canvas, element: Int[Tensor, "b m"], values: int) -> Float[Tensor, "b m v"]:
        """The same by trying."""
        x = self._vectors(canvas).clone()
        out = x.new_zeros(*element.shape, values)
        before = self._said(x)
        tried = (element >= 0)[..., None].expand(-1, -1, values).nonzero()
        for b, m, v in (part.unbind(1) for part in tried.split(self.at_once)):
            changed = x[b].clone()
            changed[torch.arange(len(b)), element[b, m]] = self.classifier.table[v].to(x)
            out[b, m, v] = self._said(changed, b) - before[b]
        return out

    @torch.no_grad()
    def _vectors(self, canvas: Canvas) -> Float[Tensor, "b E d"]:
        (kind,) = canvas.layout.kinds
        return self.classifier.vectors(canvas.value[kind], canvas.known.to(self.classifier.table.device))

    def _said(self, x: Float[Tensor, "r E d"], rows: Tensor | None = None) -> Float[Tensor, "r"]:
        """The log-probability of the class, of the rows of a canvas (None: all)."""
        said = self.classifier.log_prob(x)
        label = torch.as_tensor(self.label, device=said.device)
        label = label.expand(len(said)) if label.dim() == 0 else label if rows is None else label[rows]
        return said.gather(1, label[:, None])[:, 0]
