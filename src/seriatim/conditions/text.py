"""A text as what a sample is conditioned on: read as a whole by an encoder, whose states are attended to, or, where it
is a few words, by the model itself, in front of what it generates."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from seriatim.backbones.layer import TransformerConfig
from seriatim.backbones.transformer import Transformer
from seriatim.conditions.condition import Condition, _dropped
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


class TextPrefix(nn.Module):
    """Ids (b, m) below `vocab` in the m learned slots in front, a row of a table each; -1 stands behind the end of a
    shorter text. A dropped text has the null in every slot. In the form "vector" the mean of what stands there drives
    norms, too."""

    has_null = True

    def __init__(self, vocab: int, width: int, forms: tuple[str, ...] = ("prefix",), std: float = 0.02):
        super().__init__()
        if vocab < 1 or "prefix" not in forms or set(forms) - {"prefix", "vector"}:
            raise ValueError(f"words, at least one, are given as a prefix, or also as a vector; got {vocab}, {forms}")
        self.vocab, self.forms = vocab, forms
        self.table = nn.Parameter(torch.randn(vocab + 2, width) * std)  # the last two: behind the end, and the null

    def forward(self, raw: Int[Tensor, "b m"], drop: Bool[Tensor, "b"] | None = None) -> Condition:
        """Raises ValueError for what are no ids."""
        if raw.dim() != 2 or raw.is_floating_point() or raw.is_complex() or raw.dtype == torch.bool:
            raise ValueError(f"a text is read as ids (batch, places), integers, got {tuple(raw.shape)} {raw.dtype}")
        if raw.numel() and not -1 <= int(raw.min()) <= int(raw.max()) < self.vocab:
            raise ValueError(f"ids lie in 0..{self.vocab - 1} (-1: none), got {int(raw.min())}..{int(raw.max())}")
        ids = torch.where(raw < 0, self.vocab, raw.long())
        if (dropped := _dropped(drop, self, raw)) is not None:
            ids = torch.where(dropped[:, None], self.vocab + 1, ids)
        ids = ids.to(self.table.device)
        x = self.table[ids]
        if "vector" not in self.forms:
            return Condition(prefix=x)
        there = ((ids != self.vocab) | (ids == self.vocab).all(1, keepdim=True))[..., None]
        return Condition(prefix=x, vector=(x * there).sum(1) / there.sum(1))


def _whole_text(there: Bool[Tensor, "b m"] | None, size: int) -> Plan:
    """Slots that all see each other, but for padding; they read nothing."""
    view = full(size) if there is None else full(size).narrow(lane=torch.where(there, 0, -1))
    return plan_of(view, [0], [-1] * size, [], coord=torch.arange(size)[:, None])
