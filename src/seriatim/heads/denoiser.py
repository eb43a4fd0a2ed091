"""The small network of continuous heads: a residual MLP on one noisy value, modulated by time and hidden state.

MAR's (Li et al. 2024, arXiv 2406.11838, section 3.2 and its official code): layer norm, two linear maps with SiLU, and
a shift, scale and gate from the sum of time and state. Diffusion and flow heads share it; it knows neither.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from seriatim.heads.dist import FromStates, drawn
from seriatim.random import Key, Random

FREQUENCIES = 128
EPS = 1e-6


def time_features(t: Float[Tensor, "*rest"], frequencies: int = FREQUENCIES) -> Float[Tensor, "*rest 2*frequencies"]:
    """Cosines and sines of t, which runs to about 1,000, at frequencies from 1 down to 1/10,000."""
    steps = torch.arange(frequencies, dtype=t.dtype, device=t.device)
    angle = t[..., None] * torch.exp(-math.log(10_000) / frequencies * steps)
    return torch.cat([angle.cos(), angle.sin()], -1)


def precise(x: Tensor) -> torch.dtype:
    """float32, or float64 where `x` is."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Block(nn.Module):
    """x + gate * mlp(norm(x) shifted and scaled); the gate starts at zero."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, x: Float[Tensor, "*rest w"], y: Float[Tensor, "*rest w"]) -> Float[Tensor, "*rest w"]:
        shift, scale, gate = self.modulation(y).chunk(3, -1)
        return x + gate * self.down(F.silu(self.up(self.norm(x) * (1 + scale) + shift)))


class Denoiser(nn.Module):
    """From a noisy value of `dim` numbers to `out` numbers, given time and a hidden state of `width`.

    `hidden` is the width inside, `blocks` the number of residual blocks. The output starts at zero.
    """

    def __init__(self, width: int, dim: int, out: int, hidden: int, blocks: int):
        super().__init__()
        if min(width, dim, out, hidden, blocks) < 1:
            raise ValueError(f"sizes of a denoiser are positive, got {width}, {dim}, {out}, {hidden}, {blocks} blocks")
        self.state, self.value = nn.Linear(width, hidden), nn.Linear(dim, hidden)
        self.time = nn.Sequential(nn.Linear(2 * FREQUENCIES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(blocks))
        self.modulation, self.out = nn.Linear(hidden, 2 * hidden), nn.Linear(hidden, out)
        self._initialise()

    def _initialise(self) -> None:
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)
        for name, weight in self.named_parameters():
            if name.startswith("time.") and weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)
            elif name.startswith("out.") or "modulation." in name:
                nn.init.zeros_(weight)

    def clock(self, t: Float[Tensor, "*rest"]) -> Float[Tensor, "*rest w"]:
        """The vector of times, which run to about 1,000. Add `state(h)` to it for the modulation of `forward`."""
        return self.time(time_features(t))

    def forward(self, x: Float[Tensor, "*rest d"], modulation: Float[Tensor, "*rest w"]) -> Float[Tensor, "*rest out"]:
        y = F.silu(modulation)
        x = self.value(x)
        for block in self.blocks:
            x = block(x, y)
        shift, scale = self.modulation(y).chunk(2, -1)
        return self.out(F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift)


class Continuous(FromStates):
    """The law of a vector that a denoiser shapes out of noise. Its density is not at hand."""

    __slots__ = ()

    @property
    def temperature(self) -> float:
        """1 unless a `Warper` says otherwise; filters over ids have no meaning here."""
        if self.warper is None:
            return 1.0
        filters = [name for name in ("top_k", "top_p", "min_p", "typical") if getattr(self.warper, name) is not None]
        if filters:
            raise TypeError(f"{', '.join(filters)} choose among ids; {type(self).__name__} values are vectors")
        return self.warper.temperature

    def log_prob(self, x: Tensor) -> Tensor:
        raise TypeError(
            f"{type(self).__name__} has no log_prob: a density would need an integral over all noise that leads to a "
            "value; compare by the head's loss, or use a head with a likelihood"
        )

    def noise(self, random: Random, key: Key, draw: int, dim: int) -> Float[Tensor, "b m d"]:
        """Standard normal vectors for the read-outs, as the given draw; float32 or better, whatever the network's
        format, since a sampler adds up many small steps."""
        _, b, m, _ = self.states.shape
        x = random.normal((b, m, dim), drawn(key, draw), self.states.device)
        return x.to(precise(self.states))


class ContinuousHead(nn.Module):
    """What heads with a denoiser have in common: vectors of `dim` numbers, a loss that is an expectation over noise."""

    exact = False
    continuous = True

    def __init__(self, width: int, dim: int, out: int, hidden: int, blocks: int, draws: int):
        super().__init__()
        if draws < 1:
            raise ValueError(f"a loss needs at least 1 draw of noise a value, got {draws}")
        self.net = Denoiser(width, dim, out, hidden, blocks)
        self.width, self.dim, self.draws, self.value_shape = width, dim, draws, (dim,)

    def noises(
        self, h: Float[Tensor, "b m w"], value: Tensor, random: Random | None, key: Key | None
    ) -> tuple[Float[Tensor, "b m 1 d"], Float[Tensor, "b m n"], Float[Tensor, "b m n d"]]:
        """The values, and for each of `draws` a uniform number (draw 0 of the element) and normal noise (draw 1)."""
        if random is None or key is None:
            raise TypeError(
                f"the loss of {type(self).__name__} is an expectation over noise: pass random= to Model.losses"
            )
        b, m, _ = h.shape
        if tuple(value.shape) != (b, m, self.dim):
            raise ValueError(f"values are ({b}, {m}, {self.dim}) vectors, got {tuple(value.shape)}")
        unit = random.uniform((b, m, self.draws), key, h.device)
        noise = random.normal((b, m, self.draws, self.dim), drawn(key, 1), h.device)
        kind = precise(h)
        return value[:, :, None].to(h.device, kind), unit.to(kind), noise.to(kind)

    def told(self, x: Float[Tensor, "b m n d"], t: Float[Tensor, "b m n"], h: Float[Tensor, "b m w"]) -> Tensor:
        """What the network says of noisy values at given times, (b, m, n, out)."""
        weight = self.net.value.weight.dtype
        return self.net(x.to(weight), self.net.clock(t.to(weight)) + self.net.state(h)[:, :, None]).to(x.dtype)
