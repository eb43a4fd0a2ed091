"""Language models as their users meet them: logits of ids, log-probabilities, and text by any decoder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.canvas import Canvas, Truncate
from seriatim.decoding.loop import decode
from seriatim.interop.chat import ChatTemplate
from seriatim.interop.export import Publication
from seriatim.layout import line
from seriatim.random import Keyed
from seriatim.systems.decoders import decoder_of
from seriatim.systems.system import Sampling, evenly
from seriatim.systems.text_system import TextSystem, Windows
from seriatim.tokenizers.text import Detokenizer

Prompt = str | Sequence[int] | Int[Tensor, " n"]


@dataclass(frozen=True)
class Generation:
    """What was generated for one prompt.

    ids: the new tokens, an end of text among them; text: of these ids (None without a tokenizer); forwards: of the
    model, one after another; drafted, accepted: tokens that were suggested, and those of them that stood; seconds: of
    the batch it was generated in; logprobs: of each new token before temperature and filters, in nats, if asked for.
    """

    ids: list[int]
    text: str | None
    forwards: int
    drafted: int
    accepted: int
    seconds: float
    logprobs: list[float] | None = None


class LanguageModel(TextSystem):
    """Tokens one after another, each from all before it. `chat`: its template of conversations, if it has one."""

    chat: ChatTemplate | None = None

    @property
    def begins(self) -> bool:
        return self._prefix > 0

    @property
    def _prefix(self) -> int:
        """1 where a learned start stands before the first token."""
        return self.model.factorization.prefix  # type: ignore[attr-defined]

    def canvas(self, batch: Mapping[str, Tensor]) -> tuple[Canvas, None]:
        tokens = batch["token"]
        return self.model.canvas({"token": tokens}, self._given, layout=line(tokens.shape[1])), None

    def bytes_in(self, examples: Windows, most: int | None = None) -> int:
        ids = examples.take(evenly(len(examples), most or self.score_size))["token"]
        return int(self.tokenizer.bytes_of[ids[:, self._given :]].sum())

    @property
    def _given(self) -> int:
        """First tokens that must be given, and are not scored."""
        return 0 if self._prefix else 1

    # ---- scoring ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(
        self, ids: Int[Tensor, "batch length"], attention_mask: Int[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch length vocab"]:
        """What follows each token, from it and all before it. `attention_mask` is 0 where padding stands, on either
        side; there the logits mean nothing. Raises ValueError for shapes that do not fit."""
        if ids.dim() != 2 or ids.shape[1] < 1:
            raise ValueError(f"ids are (batch, length) with at least one token, got {tuple(ids.shape)}")
        if attention_mask is None:
            return self._packed(ids)
        if attention_mask.shape != ids.shape:
            raise ValueError(f"an attention mask of {tuple(attention_mask.shape)} for ids of {tuple(ids.shape)}")
        order = (attention_mask == 0).long().argsort(dim=1, stable=True)  # what is there moves to the front
        out = self._packed(ids.gather(1, order))
        return out.gather(1, order.argsort(1)[..., None].expand_as(out))

    def _packed(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n v"]:
        model, n = self.model, ids.shape[1]
        canvas = model.canvas({"token": F.pad(ids, (0, 1))}, self._given, layout=line(n + 1))
        plan = model.factorization.packed(canvas)
        assert plan is not None
        return model.heads["token"].logits(model.hidden(plan, canvas)[:, self._prefix :])  # type: ignore[operator]

    @torch.no_grad()
    def log_prob(self, ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch"]:
        """Log-probability in nats of whole rows; where no learned start stands in front, given their first token."""
        return self.model.log_prob(self.canvas({"token": ids})[0])

    # ---- conversations and other programs ---------------------------------------------------------------------------

    def prompt_of(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation ([{"role": "user", "content": "Hello"}, ...]) as the text of a prompt, special tokens in it,
        which the model's answer continues. Raises ValueError where there is no chat template, or it refuses."""
        if self.chat is None:
            raise ValueError(
                f"this {self.meta.key} has no chat template: it was not trained to converse, or its folder lacks "
                "chat_template.jinja or tokenizer_config.json; give it a text to continue"
            )
        return self.chat.render(messages)

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The same as ids, special tokens as theirs and none added. Raises ValueError as `prompt_of`, and where there
        is no tokenizer."""
        if self.tokenizer is None:
            raise ValueError("this model came without a tokenizer: give ids")
        prompt = self.prompt_of(messages)  # refuses models that do not converse, whatever their tokenizer
        return self.tokenizer.encode_templated(prompt)  # type: ignore[attr-defined]

    def publication(self) -> Publication:
        """The model as other programs read it. Raises ValueError where it has no counterpart there."""
        raise ValueError(f"{self.meta.key} has no counterpart in that format")

    # ---- generation -------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt] | Int[Tensor, "batch length"],
        decoder: str = "ancestral",
        *,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical: float | None = None,
        seed: int = 0,
        stop: Sequence[int] | None = None,
        stream: Callable[[str], None] | None = None,
        logprobs: bool = False,
    ) -> Generation | list[Generation]:
        """Continue a text, its ids, or a batch of either (a list of generations then), by a decoder of `DECODERS`.

        temperature 0 is greedy; stop: ids that end a row (None: the model's own); stream: called with pieces of text,
        for one prompt. Raises ValueError for prompts that are empty or too long, and decoders that do not exist.
        """
        rows, many = self._rows(prompt)
        if stream is not None and many:
            raise ValueError("text is streamed for one prompt, not for a batch")
        ends = self.stop if stop is None else tuple(stop)
        s = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical=typical)
        decider, proposer = decoder_of(self, "ancestral" if decoder == "own" else decoder, s, ends)
        start = time.perf_counter()
        canvas = self._begun(rows, max_new_tokens)
        forwards, drafted, accepted = 0, torch.zeros(len(rows)), torch.zeros(len(rows))
        pieces = None if stream is None or self.tokenizer is None else Detokenizer(self.tokenizer)
        with torch.inference_mode():
            for step in decode(self.target(None, s), canvas, decider, proposer, Keyed(seed)):
                forwards += step.forwards
                drafted, accepted = drafted + step.drafted, accepted + step.accepted
                if pieces is not None and (piece := pieces.push(self._new(canvas, rows, 0, len(pieces.ids)))):
                    stream(piece)  # type: ignore[misc]
        seconds = time.perf_counter() - start
        out = []
        for b in range(len(rows)):
            ids = self._new(canvas, rows, b)
            text = None if self.tokenizer is None else self.tokenizer.decode(ids)
            scores = self._scores([*rows[b], *ids], len(ids)) if logprobs else None
            out.append(Generation(ids, text, forwards, int(drafted[b]), int(accepted[b]), seconds, scores))
        if pieces is not None:
            stream(pieces.push(self._new(canvas, rows, 0, len(pieces.ids))) + pieces.rest())  # type: ignore[misc]
        return out if many else out[0]

    def _rows(self, prompt: object) -> tuple[list[list[int]], bool]:
        """Prompts as ids, and whether they are a batch."""
        if isinstance(prompt, Tensor):
            prompt = prompt.tolist()
        if isinstance(prompt, str):
            return [self.prompt_ids(prompt)], False
        if not isinstance(prompt, Sequence):
            raise ValueError(f"a prompt is a text, ids, or a list of either, got {type(prompt).__name__}")
        if all(isinstance(x, int) for x in prompt):
            return [list(prompt)], False
        return [self.prompt_ids(x) if isinstance(x, str) else [int(i) for i in x] for x in prompt], True

    def prompt_ids(self, text: str) -> list[int]:
        """A prompt as ids. Raises ValueError where there is no tokenizer."""
        if self.tokenizer is None:
            raise ValueError("this model came without a tokenizer: give ids")
        return self.tokenizer.encode(text)

    def _begun(self, rows: Sequence[Sequence[int]], new: int) -> Canvas:
        """A canvas with the prompts given and room for `new` tokens behind each."""
        known = torch.tensor([len(row) for row in rows])
        if new < 1:
            raise ValueError(f"at least 1 new token can be asked for, got {new}")
        if int(known.min()) + self._prefix < 1:
            raise ValueError("this model begins no text by itself: give a prompt of at least one token")
        size, room = int(known.max()) + new, self.model.layout.size
        if size > room:
            raise ValueError(
                f"the prompt takes {int(known.max())} tokens and {new} are asked for; this model takes {room} in all: "
                "shorten the prompt or --length"
            )
        value = torch.zeros(len(rows), size, dtype=torch.long)
        for b, row in enumerate(rows):
            value[b, : len(row)] = torch.tensor(row, dtype=torch.long)
        alike = bool((known == known[0]).all())
        canvas = self.model.canvas({"token": value}, int(known[0]) if alike else known, layout=line(size))
        if not alike:
            canvas.apply([Truncate(known + new)])
        return canvas

    def _new(self, canvas: Canvas, rows: Sequence[Sequence[int]], b: int, start: int = 0) -> list[int]:
        """What a row has got behind its prompt so far, from a place on."""
        end = canvas.length if canvas.length is not None else int(canvas.lengths()[b])
        return canvas.value["token"][b, len(rows[b]) + start : end].tolist()

    def _scores(self, ids: list[int], new: int) -> list[float]:
        """Log-probabilities of the last `new` ids."""
        if not new:
            return []
        whole = torch.tensor([ids])
        said = torch.log_softmax(self.logits(whole)[0, -new - 1 : -1].float(), -1)
        return said.gather(1, whole[0, -new:, None])[:, 0].tolist()
