"""A published model of two halves as its users meet it: an encoder reads the prompt, and what is generated is an answer
that begins at a start id of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.conditions.condition import Condition
from seriatim.decoding.target import Target
from seriatim.interop.blueprint import EncoderDecoderBlueprint
from seriatim.random import Generator
from seriatim.systems.decoders import Decoding
from seriatim.systems.language_model import Generation, LanguageModel, Prompt
from seriatim.systems.published import Published
from seriatim.systems.system import Sampling
from seriatim.systems.text_system import TextSystem

ANSWER = 200  # tokens, where nothing else is said


class EncoderDecoder(Published):
    """Tokens of an answer one after another, each from all before it and from the whole prompt."""

    config: EncoderDecoderBlueprint
    continues = False
    prompts: Int[Tensor, "b m"] | None = None  # that are being answered, -1 behind their ends

    @property
    def start(self) -> int:
        """The id that stands before every answer."""
        return int(self.settings.get("decoder_start_token_id", self.config.start))

    # ---- prompts ----------------------------------------------------------------------------------------------------

    def answering(self, prompts: Int[Tensor, "b m"]) -> EncoderDecoder:
        """This model, same weights, with prompts to answer (-1 behind their ends)."""
        bound = copy.copy(self)
        bound.__dict__["prompts"] = prompts
        return bound

    def _answering(self, ids: Tensor, encoder_ids: Tensor | None, encoder_mask: Tensor | None) -> EncoderDecoder:
        """The same, for given answers and prompts with padding on either side."""
        if encoder_ids is None:
            return self
        if encoder_ids.dim() != 2 or len(encoder_ids) not in (1, len(ids)):
            raise ValueError(f"encoder_ids are (batch, places) for {len(ids)} rows, got {tuple(encoder_ids.shape)}")
        if encoder_mask is not None:
            if encoder_mask.shape != encoder_ids.shape:
                raise ValueError(
                    f"an encoder mask of {tuple(encoder_mask.shape)} for ids of {tuple(encoder_ids.shape)}"
                )
            gone = encoder_mask == 0
            encoder_ids = encoder_ids.masked_fill(gone, -1).gather(1, gone.long().argsort(dim=1, stable=True))
        return self.answering(encoder_ids.expand(len(ids), -1))

    @property
    def _raw(self) -> dict[str, Tensor]:
        if self.prompts is None:
            raise ValueError("an encoder-decoder answers texts: give them as encoder_ids")
        return {"text": self.prompts}

    def _encoded(self) -> Condition:
        return self.model.encode(self._raw)

    # ---- scoring ----------------------------------------------------------------------------------------------------

    def logits(
        self,
        ids: Int[Tensor, "batch length"],
        attention_mask: Int[Tensor, "batch length"] | None = None,
        encoder_ids: Int[Tensor, "batch places"] | None = None,
        encoder_mask: Int[Tensor, "batch places"] | None = None,
    ) -> Float[Tensor, "batch length vocab"]:
        """What follows each token of an answer that begins with `start`, given the prompts `encoder_ids` (one for all
        rows, or one each). Masks are 0 where padding stands. Raises ValueError for shapes that do not fit."""
        return LanguageModel.logits(self._answering(ids, encoder_ids, encoder_mask), ids, attention_mask)

    @torch.no_grad()
    def log_prob(
        self,
        ids: Int[Tensor, "batch length"],
        encoder_ids: Int[Tensor, "batch places"] | None = None,
        encoder_mask: Int[Tensor, "batch places"] | None = None,
    ) -> Float[Tensor, "batch"]:
        """Log-probability in nats of whole answers given their prompts and their first token."""
        bound = self._answering(ids, encoder_ids, encoder_mask)
        return self.model.log_prob(bound.canvas({"token": ids})[0], bound._raw)

    def losses(self, batch: Mapping[str, Tensor], random: Generator, drop: float) -> tuple[Tensor, Tensor]:
        raise ValueError(
            f"{self.meta.key} answers texts: it cannot be trained on, or scored by, a text alone; use log_prob with "
            "encoder_ids"
        )

    # ---- generation -------------------------------------------------------------------------------------------------

    def target(self, condition: Mapping[str, Tensor] | None, sampling: Sampling, **more: Any) -> Target:
        return super().target(self._raw, sampling, **more)

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt] | Int[Tensor, "batch length"],
        decoder: str | Decoding = "ancestral",
        *,
        logprobs: bool = False,
        **settings: Any,
    ) -> Generation | list[Generation]:
        """Answer a text, its ids, or a batch of either; everything else as in `LanguageModel.generate`."""
        rows, many = self._rows(prompt)
        if not rows or not all(rows):
            raise ValueError("there is nothing to answer: give a prompt of at least one token")
        bound = self.answering(_padded(rows))
        starts = [[self.start]] * len(rows)
        made = LanguageModel.generate(bound, starts if many else starts[0], decoder, **settings)
        if not logprobs:
            return made
        each = made if isinstance(made, list) else [made]
        asked = [row for row in rows for _ in range(len(each) // len(rows))]
        scored = [
            replace(g, logprobs=self.answering(_padded([row])).scores([self.start, *g.ids], len(g.ids)))
            for row, g in zip(asked, each, strict=True)
        ]
        return scored if isinstance(made, list) else scored[0]

    def stream(
        self, prompt: str | Sequence[int], length: int | None = None, *rest: Any, **settings: Any
    ) -> Iterator[str]:
        """Pieces of the answer as they are decided; as in `TextSystem.stream`."""
        return TextSystem.stream(self.asked(prompt), prompt, length, *rest, **settings)

    def asked(self, prompt: str | Sequence[int]) -> EncoderDecoder:
        """This model with the prompt to answer."""
        ids = self.prompt_ids(prompt) if isinstance(prompt, str) else prompt
        return self.answering(_padded([ids]))

    def prompted(self, prompt: str | Sequence[int], length: int | None) -> Canvas:
        return self._begun([[self.start]], ANSWER if length is None else length)


def _padded(rows: Sequence[Sequence[int]]) -> Int[Tensor, "b m"]:
    """Rows of ids, -1 behind the end of shorter ones."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (longest - len(row))] for row in rows])
