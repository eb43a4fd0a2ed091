"""A text as what a sample is conditioned on: read as a whole by an encoder, whose states are attended to."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from seriatim.backbones.layer import TransformerConfig
from seriatim.backbones.transformer import Transformer
from seriatim.conditions.condition import Condition
from seriatim.plan import Plan, plan_of
from seriatim.view import full


class TextEncoder(nn.Module):
    """Ids (b, m) through a table and a transformer in which every token sees every other; -1 stands behind the end of
    a shorter text. `table`: of embeddings, (vocabulary, width), perhaps one that the model has anyway."""

    has_null = False

    def __init__(self, config: TransformerConfig, table: nn.Parameter):
        super().__init__()
        self.table, self.backbone = table, Transformer(config)

    def forward(self, raw: Int[Tensor, "b m"], drop: Bool[Tensor, "b"] | None = None) -> Condition:
        """The last states as memory. Raises ValueError for what are no ids, or rows without any."""
        vocab = self.table.shape[0]
        if raw.dim() != 2 or raw.is_floating_point() or raw.is_complex() or raw.dtype == torch.bool:
            raise ValueError(f"a text is read as ids (batch, places), integers, got {tuple(raw.shape)} {raw.dtype}")
        there = raw >= 0
        if not raw.numel() or not bool(there.any(1).all()):
            raise ValueError("a text to be read holds at least one token, in every row")
        if int(raw.max()) >= vocab:
            raise ValueError(f"ids lie in 0..{vocab - 1}, got {int(raw.max())}: the tokenizer is of another vocabulary")
        raw, there = raw.to(self.table.device), there.to(self.table.device)
        x = torch.embedding(self.table, raw.clamp(min=0))
        whole = bool(there.all())
        h = self.backbone(x, _whole_text(None if whole else there.cpu(), raw.shape[1]))
        return Condition(memory=h, there=None if whole else there)


def _whole_text(there: Bool[Tensor, "b m"] | None, size: int) -> Plan:
    """Slots that all see each other, but for padding; they read nothing."""
    view = full(size) if there is None else full(size).narrow(lane=torch.where(there, 0, -1))
    return plan_of(view, [0], [-1] * size, [], coord=torch.arange(size)[:, None])
