"""A model in the ids of another tokenizer: it reads and says what the other one's ids stand for, as far as it can.

Ids are exchanged one for one, so what is one token there is one token here: a token that the model does not know is
read as one that ends alike, and is never said. So its law is not what it would say of the same text in its own tokens;
as a draft any law will do.
"""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from seriatim.canvas import Canvas
from seriatim.embed import TokenEmbed
from seriatim.heads.categorical import CategoricalHead
from seriatim.heads.dist import Categorical
from seriatim.model import Model
from seriatim.plan import Reads


class TranslatedHead(nn.Module):
    """Logits of `vocab` ids, of which a head knows `ids` (in its own order); the others are impossible."""

    exact = True
    continuous = False
    value_shape: tuple[int, ...] = ()

    def __init__(self, head: CategoricalHead, ids: Int[Tensor, " known"], vocab: int):
        super().__init__()
        self.head, self.vocab, self.width = head, vocab, head.width
        self.register_buffer("ids", ids)

    def logits(self, h: Float[Tensor, "b m d"], reads: Reads | None = None) -> Float[Tensor, "b m v"]:
        said = self.head.logits(h, reads)
        whole = said.new_full((*said.shape[:-1], self.vocab), -torch.inf)
        return whole.index_copy_(-1, self.ids, said)  # type: ignore[arg-type]

    def dist(self, h: Float[Tensor, "b m d"], reads: Reads | None, canvas: Canvas) -> Categorical:
        return Categorical(self.logits(h, reads))


def translated(model: Model, same: Int[Tensor, " vocab"], like: Int[Tensor, " vocab"]) -> Model:
    """A model in other ids, with the weights of this one; for generation only. Of each new id, `same` is the one of the
    model's that is said as it (-1: none), `like` the one that is read in its place. Raises ValueError where the model
    is not one of plain ids, or knows none of them."""
    embed, head = model.embed, dict(model.heads.items()).get("token")
    if not isinstance(embed, TokenEmbed) or not isinstance(head, CategoricalHead) or model.conditions:
        raise ValueError("only models that read and say one id after another, and nothing else, can be translated")
    known = (same >= 0).nonzero()[:, 0]
    if not len(known):
        raise ValueError("the two vocabularies have no piece in common")
    device = model.device
    reading = copy.copy(embed)
    table = nn.Parameter(embed.table.detach()[like.to(device)], requires_grad=False)
    reading._parameters = {**embed._parameters, "table": table}
    reading.vocab = len(same)
    saying = TranslatedHead(head.limited(same[known].to(device)), known.to(device), len(same))
    return Model(model.layout, model.factorization, reading, model.backbone, saying).eval()
