"""A published model that decides masks, of a whole text or block after block, from its folder: LLaDA, Dream, SDAR and
their like."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from seriatim.canvas import Canvas, Set
from seriatim.decoding.loop import decode
from seriatim.decoding.shaping import Without
from seriatim.decoding.target import Target
from seriatim.factorization.static import Blocks
from seriatim.interop.blueprint import MaskedBlueprint, Part
from seriatim.interop.chat import ChatTemplate
from seriatim.interop.export import Publication, published_tensors
from seriatim.layout import line
from seriatim.model import pick_slots
from seriatim.objectives.masked import Masked
from seriatim.plan import Plan
from seriatim.random import Keyed
from seriatim.systems.conversing import Conversing
from seriatim.systems.decoders import Decoding, Onlooker, decoder_of
from seriatim.systems.generation import Generation
from seriatim.systems.masked_text import MaskedText
from seriatim.systems.meta import Meta
from seriatim.systems.published import WINDOW
from seriatim.systems.system import Sampling
from seriatim.systems.tokens import token_ids
from seriatim.tokenizers.text import Detokenizer


class PublishedMasked(Conversing, MaskedText):
    """A model that somebody published, which decides masks, in our parts. `config` is its blueprint, `raw` its
    config.json, `settings` its generation_config.json, `chat` its template of conversations (None: it has none).

    Sampled as its authors do, with one difference: the mask itself is never written."""

    validation_size = 16  # windows of a thousand tokens, each time a training looks at them

    config: MaskedBlueprint
    model: Masked

    def __init__(
        self, plan: MaskedBlueprint, model: Masked, tokenizer: Any, raw: dict[str, Any], settings: dict[str, Any],
        chat: ChatTemplate | None = None,
    ):  # fmt: skip
        nn.Module.__init__(self)
        self.config, self.model, self.raw, self.settings, self.chat = plan, model, raw, settings, chat
        name = raw["model_type"]
        self.__dict__["tokenizer"] = tokenizer
        self.meta = Meta(name, name, "text", "text", "", "bound", f"A published model of type {name}.")  # type: ignore[misc]
        self.sampling = Sampling(**plan.sampling)  # type: ignore[misc]

    @property
    def stop(self) -> tuple[int, ...]:
        eos = self.settings.get("eos_token_id")
        said = [] if eos is None else eos if isinstance(eos, list) else [eos]
        return tuple(dict.fromkeys((*said, *self.config.ends)))

    @property
    def mask(self) -> int:
        return self.config.mask

    @property
    def begins(self) -> bool:
        return not self.config.shift

    @property
    def window(self) -> int:
        return min(self.config.length, WINDOW)

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.config.parts

    def publication(self) -> Publication:
        """The model as other programs read it. Raises ValueError where its weights have no published form any more."""
        tensors = published_tensors(self.model.state_dict(), self.config.parts, self.config.backbone)
        return Publication(self.raw, tensors, self.settings)

    # ---- scoring ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(
        self, ids: Int[Tensor, "batch length"], hidden: Bool[Tensor, "batch length"]
    ) -> Float[Tensor, "batch length vocab"]:
        """What the model says of each token that is `hidden` from it, given the others: in blocks, those of its block
        and of earlier blocks (hidden ones of earlier blocks as they are). Zeros where nothing is hidden."""
        if ids.dim() != 2 or hidden.shape != ids.shape or hidden.dtype != torch.bool:
            raise ValueError(f"ids are (batch, length), and what is hidden a boolean as large; got {tuple(ids.shape)}")
        model, layout = self.model, line(ids.shape[1])
        if isinstance(model.factorization, Blocks):
            shown = model.canvas({"token": ids}, layout=layout)
            shown.apply([Set(ids, torch.where(hidden, -1, torch.arange(layout.size)))])
            plan: Plan | None = model.factorization.packed(shown)
        else:
            shown = model.canvas({"token": ids}, ~hidden, layout=layout)
            plan = model.factorization.step(shown, None, 0)
        out = torch.zeros(*ids.shape, self.config.vocab, dtype=self.model.heads["token"].weight.dtype)  # type: ignore[union-attr, arg-type]
        if plan is None:
            return out
        h = pick_slots(model.hidden(plan, shown), plan.reads.slot)
        said = model.heads["token"].logits(h).to(out)  # type: ignore[operator]
        row, column = (plan.reads.element.expand(len(ids), -1) >= 0).nonzero(as_tuple=True)
        out[row, plan.reads.element.expand(len(ids), -1)[row, column]] = said[row, column]
        return out

    # ---- generation -------------------------------------------------------------------------------------------------

    def target(self, condition: Mapping[str, Tensor] | None, sampling: Sampling, **more: Any) -> Target:
        mask = Without((self.config.mask,))
        return super().target(condition, sampling, **{"shapers": (*sampling.shapers, mask), **more})

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 200,
        seed: int = 0,
        decoder: str | Decoding = "own",
        watch: Onlooker | None = None,
        **sampling: Any,
    ) -> Generation:
        """Continue a text or its ids by a decoder (`decoder_of`, family "unmasking"); sampling: fields of `Sampling`
        (temperature, top_p, steps, ...), the model's own where left out, tokens by id or name; watch: who looks on
        (`evaluation.text_film.Recorder`)."""
        named = {k: token_ids(self.tokenizer, v) for k, v in sampling.items() if k.endswith("_tokens")}
        s = Sampling(**{**self.config.sampling, **sampling, **named})
        way = decoder_of(self, decoder, s, self.stop)
        trace: list[Any] = []
        start = time.perf_counter()
        with torch.inference_mode():
            ids = [i for piece in self._written(prompt, max_new_tokens, s, seed, way, trace, watch) for i in piece]
        text = None if self.tokenizer is None else self.tokenizer.decode(ids)
        rows = tuple(step.slots for step in trace)
        return Generation(ids, text, sum(x.forwards for x in trace), 0, 0, time.perf_counter() - start, rows=rows)

    def stream(
        self,
        prompt: str | Sequence[int],
        length: int | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        decoding: Decoding | None = None,
        trace: list[Any] | None = None,
        watch: Onlooker | None = None,
    ) -> Iterator[str]:
        """As of all texts; of a prompt of ids too. Without a tokenizer ids with a space between."""
        pieces = None if self.tokenizer is None else Detokenizer(self.tokenizer)
        for ids in self._written(prompt, length, sampling or self.sampling, seed, decoding, trace, watch):
            piece = "".join(f"{i} " for i in ids) if pieces is None else pieces.push(ids)
            if piece:
                yield piece
        if pieces is not None and (rest := pieces.rest()):
            yield rest

    def _written(
        self, prompt: str | Sequence[int], length: int | None, sampling: Sampling, seed: int, decoding: Decoding | None,
        trace: list[Any] | None, watch: Onlooker | None = None,
    ) -> Iterator[list[int]]:  # fmt: skip
        """New ids from the front as they are decided, at most `length`."""
        ids = self.prompt_ids(prompt) if isinstance(prompt, str) else list(prompt)
        way = decoding or Decoding(self.decider(sampling), self.proposer(sampling))
        way = way if watch is None else watch(way)
        canvas = self.begun(ids, length)
        if way.block is not None:
            canvas = self.blocked(canvas, way.block)
        target, told = self.target(None, sampling, **way.target), len(ids)
        end = canvas.layout.size if length is None else told + length
        firm = not getattr(way.decider, "redraws", False)
        for step in decode(target, canvas, way.decider, way.proposer, Keyed(seed)):
            if trace is not None:
                trace.append(step)
            if not (firm or canvas.done):  # it may yet be another
                continue
            new = self._settled(canvas, told)[: end - told]
            told += len(new)
            yield new
            if told == end:
                return

    def prompted(self, prompt: str | Sequence[int], length: int | None) -> Canvas:
        return self.begun(self.prompt_ids(prompt) if isinstance(prompt, str) else prompt, length)

    def begun(self, ids: Sequence[int], length: int | None) -> Canvas:
        """A canvas with a prompt given and masks for `length` tokens behind it, and, where they stand in blocks, for
        the rest of the last block. Raises ValueError where they do not fit."""
        plain = super().begun(ids, length)
        known, room, block = len(ids), self.model.layout.size, self.config.block
        if not known and not self.begins:
            raise ValueError("this model begins no text by itself: give a prompt of at least one token")
        if block is None:
            return self.blocked(plain, self.config.within or plain.layout.size)
        size = min(math.ceil(plain.layout.size / block) * block, room)
        value = torch.nn.functional.pad(plain.value["token"], (0, size - plain.layout.size))
        plain = self.model.canvas({"token": value}, known, layout=line(size))
        return self.blocked(plain, self.config.within or block)
