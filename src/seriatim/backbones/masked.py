"""A masked autoencoder (He et al. 2021, arXiv 2111.06377) over slots, as MAR has it: an encoder that runs over what is
shown only, and a decoder of the same size over everything.

Masks meet the decoder as they are. Learned positions stand before each stack and behind both, the last for elements
alone; a norm behind each stack, one before the encoder, and a linear map between the two. A plan of phases (Hi-MAR) may
have positions of its own for each of them before the stacks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from seriatim.backbones.cache import KVCache
from seriatim.backbones.layer import TransformerConfig
from seriatim.backbones.norm import normalise
from seriatim.backbones.transformer import Transformer
from seriatim.initial import drawn
from seriatim.plan import MASK, Plan
from seriatim.slots import ragged


class MaskedAutoencoder(nn.Module):
    """Two stacks of this config, over `prefix` learned slots and `elements`, each of which stands in one slot. phases:
    how many tables of positions there are, by `Plan.phase`. A conditioning vector is one for the whole forward.

    Every forward computes everything: nothing is remembered, and only orders that keep nothing are decoded.
    """

    def __init__(self, config: TransformerConfig, prefix: int, elements: int, phases: int = 1):
        super().__init__()
        if config.memory is not None or not config.last_norm or phases < 1:
            raise ValueError("a masked autoencoder is told a class by slots in front, ends in norms, and has 1 phase")
        d, self.prefix = config.width, prefix
        self.config, self.width = config, d
        self.encoder, self.decoder = Transformer(config), Transformer(config)
        self.norm = nn.Parameter(torch.ones(d))
        self.norm_bias = nn.Parameter(torch.zeros(d)) if config.norm == "layer" else None
        self.join = nn.Linear(d, d)
        self.slots = prefix + elements
        sizes = phases * self.slots, phases * self.slots, elements
        self.positions = nn.ParameterList(nn.Parameter(drawn(n, d)) for n in sizes)
        self.mixers = self.decoder.mixers

    def new_cache(self, batch: int, capacity: int = 256) -> KVCache:
        """A cache that stays empty."""
        return self.decoder.new_cache(batch, 1)

    def forward(
        self, x: Float[Tensor, "b s d"], plan: Plan, cache: KVCache | None = None, vector: Tensor | None = None,
        *more: Any,
    ) -> Float[Tensor, "b s d"]:  # fmt: skip
        """Contextualise slots."""
        before, between, behind = self.positions
        element = plan.slots.element[..., 0]
        place = torch.where(element < 0, plan.slots.coord[..., 0], self.prefix + element).to(x.device)
        place = place + self.slots * plan.phase
        shown, masked = self._shown(plan), (plan.slots.source == MASK).to(x.device)[..., None]
        h = normalise(self.config.norm, x + before[place], self.norm, self.norm_bias, self.config.eps)
        if bool(masked.any()):
            index = shown.to(x.device).expand(len(x), -1)
            wide = index.clamp(min=0)[..., None].expand(-1, -1, self.width)
            part = self.join(self.encoder(h.gather(1, wide), plan.take(shown), None, vector))
            spare = torch.where(index >= 0, index, x.shape[1])[..., None].expand_as(part)  # where padding goes
            h = F.pad(x, (0, 0, 0, 1)).scatter(1, spare, part.to(x))[:, :-1]
        else:
            h = self.join(self.encoder(h, plan, None, vector))
        h = self.decoder(h + between[place], plan, None, vector)
        there = (element >= 0).to(x.device)[..., None]
        return h + behind[element.clamp(min=0).to(x.device)] * there

    @staticmethod
    def _shown(plan: Plan) -> Int[Tensor, "b m"]:
        """The slots that hold no mask; -1: padding, of rows that have fewer."""
        hidden = plan.slots.source == MASK
        lanes = [view.lane for view in plan.views.values() if view.lane is not None]
        for lane in lanes:  # what is cut off takes part in nothing
            hidden = hidden | (lane < 0)
        return ragged(~hidden)
