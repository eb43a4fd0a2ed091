"""A tiny system of text that fills gaps of unknown length by insertion."""

from __future__ import annotations

import torch

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import GIVEN
from seriatim.decoding.insert import Inserting
from seriatim.embed import TokenEmbed
from seriatim.factorization.insertion import Insertion
from seriatim.heads.dist import Categorical
from seriatim.heads.insertion import InsertionHead
from seriatim.laws.case import randomise
from seriatim.layout import line
from seriatim.model import Model
from seriatim.systems.decoders import Decoding
from seriatim.systems.infill import Gap
from seriatim.systems.meta import Meta
from seriatim.systems.text_system import TextSystem
from seriatim.tokenizers.text import ByteTokenizer

META = Meta("inserts", "Inserts", "text", "text", "none", "none", "Letters inserted into gaps.")


class InGaps(Inserting):
    """Inserts behind what was inserted, and behind the given elements `seams` only."""

    def __init__(self, limit, seams):
        super().__init__(limit, stop=0.99)
        self.seams = torch.tensor(seams)

    def decide(self, canvas, guess, rows, random):
        element = rows.element
        closed = (canvas.status.gather(1, element.clamp(min=0)) == GIVEN) & ~torch.isin(element, self.seams)
        if 0 not in self.seams:
            closed |= element == 0
        vocab = (rows.dist.logits.shape[-1] - 1) // element.shape[1]
        gone = torch.nn.functional.pad(closed.repeat_interleave(vocab, 1), (0, 1))[:, None]
        return super().decide(
            canvas, guess, rows._replace(dist=Categorical(rows.dist.logits.masked_fill(gone, -torch.inf))), random
        )


class Inserts(TextSystem):
    meta, fills = META, "unknown"

    def __init__(self, most=6):
        self.most = most
        super().__init__(None, ByteTokenizer())

    @staticmethod
    def build(config, tokenizer):
        backbone = Transformer(TransformerConfig(16, 1, 2, rope=RoPE()))
        model = Model(line(64), Insertion(), TokenEmbed(272, 16), backbone, InsertionHead(16, 272))
        return randomise(model, 0, 0.3)

    def gapped(self, parts):
        """Element 0 is the open end; the texts stand behind it, and gaps are seams between them."""
        ids = [i for part in parts if isinstance(part, str) for i in self.tokenizer.encode(part)]
        known = torch.tensor([[False] + [True] * len(ids)])
        return self.model.canvas({"token": torch.tensor([[0, *ids]])}, known, layout=line(1 + len(ids)))

    def filling(self, parts, sampling):
        seams, count = [], 0
        for part in parts:
            if isinstance(part, Gap):
                seams.append(count)
            else:
                count += len(self.tokenizer.encode(part))
        return Decoding(InGaps(count + self.most, seams))
