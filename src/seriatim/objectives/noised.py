"""Training of discrete diffusion by any kernel: values are turned into noise for k of T steps, and the model says what
they were.

D3PM (Austin et al. 2021, arXiv 2107.03006): the bound on a sample's negative log-likelihood is, in nats,
sum over k of KL(q(x_{k-1} | x_k, x_0) || p(x_{k-1} | x_k)), whose first term is -log p(x_0 | x_1), and what the last
x_T has not forgotten. p is the posterior in which the model's law of x_0 takes the place of x_0. With the absorbing
kernel it is the bound of masked diffusion (`masked`) in T steps: weight 1/k for what is hidden at step k.

Score entropy (Lou et al. 2024, arXiv 2310.16834) is here as a function of scores; for masks it is that bound, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from seriatim.canvas import Canvas, Revise
from seriatim.conditions.condition import Condition
from seriatim.embed import TokenEmbed
from seriatim.heads.denoiser import FREQUENCIES, time_features
from seriatim.heads.kernels import Kernel
from seriatim.model import Model
from seriatim.objectives.masked import showing
from seriatim.random import ORDER, Generator, Key, Random, numbered

JUDGED = 4  # draws of each row in evaluation mode, at steps spread evenly


class NoisedEmbed(TokenEmbed):
    """Ids, and the noise that stands in their places: another id, or the mask, which is the id behind all values. told:
    how noisy the row is, is added where noise stands, at first nothing."""

    def __init__(self, vocab: int, width: int, positions: Sequence[int] = (), told: bool = True, std: float = 0.02):
        super().__init__(vocab, width, positions=positions, mask=True, start=False, std=std)
        self.time = None
        if told:
            last = nn.Linear(width, width)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.time = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), last)

    def vectors(self, value: Int[Tensor, "*rest"]) -> Float[Tensor, "*rest d"]:
        assert self.mask is not None
        return torch.embedding(torch.cat([self.table, self.mask[None]]), value)

    def levels(self, level: Float[Tensor, "b s"]) -> Float[Tensor, "b s d"] | None:
        return None if self.time is None else self.time(time_features(1000 * level))


class Noised(Model):
    """A model of elements that are denoised where they stand (`InPlace`), whose losses are those of one draw of noise,
    in evaluation mode the mean of `JUDGED` draws. Its head says what it believes of each element without regard to what
    stands there: that is weighed in by the kernel."""

    def __init__(self, *parts: Any, kernel: Kernel):
        super().__init__(*parts)
        for kind, head in self.heads.items():
            if head.vocab != kernel.vocab:
                raise ValueError(f"the noise is of {kernel.vocab} ids, and the head of {kind!r} predicts {head.vocab}")
        self.kernel = kernel

    def losses(
        self,
        canvas: Canvas,
        condition: Mapping[str, Tensor] | Condition | None = None,
        drop: Bool[Tensor, "b"] | None = None,
        strict: bool = False,
        random: Random | None = None,
    ) -> Float[Tensor, "b E"]:
        """The bound of each element that is to be decided, in nats, by draws of noise (0 for the others). `strict` is
        refused: a draw of a bound is no likelihood."""
        if strict:
            raise TypeError("one draw of a bound is no likelihood; average `losses` over draws")
        random, draws, batch = random or Generator(), 1 if self.training else JUDGED, canvas.batch
        encoded = condition if isinstance(condition, Condition) else self.encode(condition, drop)
        which, row = torch.arange(draws).repeat_interleave(batch), torch.arange(batch).repeat(draws)
        rows = canvas.select(row)
        rows.row = rows.row + which * (int(canvas.row.max()) + 1)  # whose noise is another
        unit = random.uniform((len(row), 1), Key(rows.row, 0, numbered(ORDER, 0, 1)))[:, 0]
        share = (which + (row + unit) / batch) / draws
        k = 1 + (share * self.kernel.steps).long().clamp(max=self.kernel.steps - 1)
        losses = self.noised_losses(rows, self.noise(rows, k, random), k, encoded.select(row))
        kept = self.kernel.prior_loss().to(losses)[canvas.value[self._kind].clamp(min=0)]
        found = self.kernel.steps * losses.view(draws, batch, -1).mean(0)
        return found + kept * canvas.open.to(losses)

    @property
    def _kind(self) -> str:
        (kind,) = self.layout.kinds
        return kind

    def noise(self, canvas: Canvas, k: Int[Tensor, "b"], random: Random) -> Int[Tensor, "b E"]:
        """x_k of every element of finished samples."""
        law = self.kernel.rows(canvas.value[self._kind], k, torch.float32)
        element = torch.arange(canvas.layout.size).expand(canvas.batch, -1)
        return random.categorical(law.log(), Key(canvas.row, element, numbered(ORDER)))

    def noised(self, canvas: Canvas, x: Int[Tensor, "b E"], k: Int[Tensor, "b"]) -> Canvas:
        """What decoding sees of samples whose elements have become x after k steps: what is given, and noise. After
        all steps there is nothing but noise, and nothing stands there."""
        shown = showing(self, canvas, ~canvas.open)
        some = canvas.open & (k < self.kernel.steps)[:, None]
        if not bool(some.any()):
            return shown
        level = (k / self.kernel.steps)[:, None].expand(x.shape)
        return shown.apply([Revise(torch.where(some, torch.arange(x.shape[1]), -1), x, level)])

    def noised_losses(
        self,
        canvas: Canvas,
        x: Int[Tensor, "b E"],
        k: Int[Tensor, "b"],
        condition: Mapping[str, Tensor] | Condition | None = None,
    ) -> Float[Tensor, "b E"]:
        """KL(q(x_{k-1} | x_k, x_0) || p(x_{k-1} | x_k)) of each element that is to be decided, where they have become x
        after k steps; 0 for the others. It is the very step that decoding takes on such a canvas."""
        shown = self.noised(canvas, x, k)
        plan = self.factorization.step(shown, None, 0)
        if plan is None:  # all is given: a loss of zero that still knows the weights
            return sum(p.sum() * 0.0 for p in self.parameters()) + torch.zeros(x.shape, device=self.device)
        if self._sound is not self.factorization:  # an order that peeks is refused before it is trained
            plan.check(self.mixers, canvas.open)
            self._sound = self.factorization
        encoded = condition if isinstance(condition, Condition) else self.encode(condition)
        dist, element, _ = self.dist(self.hidden(plan, shown, None, encoded), plan, shown)
        element = torch.as_tensor(element).expand(canvas.batch, -1)
        logits = dist.logits  # type: ignore[attr-defined]
        index = element.clamp(min=0)
        x0, xk = canvas.value[self._kind].gather(1, index), x.gather(1, index)
        with torch.autocast(logits.device.type, enabled=False):
            loss = divergence(self.kernel, logits, x0.to(logits.device), xk.to(logits.device), k.to(logits.device))
        out = torch.zeros(x.shape, dtype=loss.dtype, device=loss.device)
        return out.scatter_add(1, index.to(loss.device), loss * (element >= 0).to(loss))


def divergence(
    kernel: Kernel,
    logits: Float[Tensor, "b m v"],
    x0: Int[Tensor, "b m"],
    xk: Int[Tensor, "b m"],
    k: Int[Tensor, "b"],
) -> Float[Tensor, "b m"]:
    """KL(q(x_{k-1} | x_k, x_0) || p(x_{k-1} | x_k)) in nats, where logits are the belief about x_0 without regard to
    x_k. At k = 1 it is -log p(x_0 | x_1)."""
    exact = logits if logits.dtype == torch.float64 else logits.float()
    wanted = kernel.posterior(xk, kernel.rows(x0, k - 1, exact.dtype), k)
    said = kernel.posterior(xk, kernel.mixed(torch.softmax(exact, -1), k - 1), k)
    said = said.clamp(min=torch.finfo(exact.dtype).tiny)
    return (torch.xlogy(wanted, wanted) - wanted * said.log()).sum(-1)


# ---- score entropy ---------------------------------------------------------------------------------------------------


def score_entropy(log_score: Float[Tensor, "*b y"], ratio: Float[Tensor, "*b y"]) -> Float[Tensor, "*b"]:
    """Sum over the other states y of s - r log s + r (log r - 1): 0 where the scores s are the ratios r = p(y) / p(x),
    and positive elsewhere (equation 5 there)."""
    met = torch.where(ratio > 0, ratio * log_score, 0.0)
    return (log_score.exp() - met + torch.xlogy(ratio, ratio) - ratio).sum(-1)


def masked_score_entropy(
    logits: Float[Tensor, "b m v"], value: Int[Tensor, "b m"], shown: float | Float[Tensor, "b 1 1"]
) -> Float[Tensor, "b m"]:
    """Score entropy of hidden elements, where a share `shown` is shown and logits are a model's law of the values: the
    score of becoming v is shown / (1 - shown) times its probability. Weighed by the rate of masking, -shown' / shown,
    it is the loss of `by_time`: cross-entropy times -shown' / (1 - shown)."""
    odds = torch.as_tensor(shown / (1 - shown), dtype=logits.dtype, device=logits.device)
    ratio = odds * nn.functional.one_hot(value, logits.shape[-1]).to(logits)
    return score_entropy(odds.log() + torch.log_softmax(logits, -1), ratio)
