"""Language models as their users meet them: logits of ids, log-probabilities, and text by any decoder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.canvas import Canvas, Truncate
from seriatim.conditions.condition import Condition
from seriatim.data.conversations import Conversations
from seriatim.decoding.loop import Step, decode, select_rows
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.shaping import Constraint
from seriatim.decoding.target import Target
from seriatim.interop.answers import Answers, answers_of
from seriatim.interop.blueprint import Part
from seriatim.interop.export import Publication
from seriatim.interop.grammar import Grammar
from seriatim.interop.tokenizer import PublishedTokenizer
from seriatim.layout import line
from seriatim.random import Generator, Keyed
from seriatim.systems.conversing import Conversing
from seriatim.systems.decoders import Decoding, Onlooker, decoder_of
from seriatim.systems.generation import Generation, Watch
from seriatim.systems.system import Sampling
from seriatim.systems.tokens import token_ids

Prompt = str | Sequence[int] | Int[Tensor, " n"]


class LanguageModel(Conversing):
    """Tokens one after another, each from all before it."""

    continues = True  # what is generated stands behind the prompt

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

    def losses(self, batch: Mapping[str, Tensor], random: Generator, drop: float) -> tuple[Tensor, Tensor]:
        """Of all tokens, or of those that count: the answers of a conversation."""
        canvas, _ = self.canvas(batch)
        losses = self.model.losses(canvas, random=random)
        counts = batch.get("counts", canvas.rank >= 0).to(losses.device)
        return self.summed(torch.where(counts, losses, 0), counts)

    def answers(self, side: Conversations, length: int | None = None) -> Answers:
        """Conversations as training draws them, by the model's own template, answers alone counting. Raises ValueError
        where there is no template, or nothing to learn."""
        if self.chat is None or not isinstance(self.tokenizer, PublishedTokenizer):
            raise ValueError(
                f"this {self.meta.key} has no chat template, so conversations mean nothing to it: give texts, or a "
                "model that converses"
            )
        return answers_of(side, self.chat, self.tokenizer, self.stop, length or self.window)

    @property
    def _given(self) -> int:  # type: ignore[override]
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
        return self.model.heads["token"].logits(self.states(ids))  # type: ignore[operator]

    def states(self, ids: Int[Tensor, "batch length"], route: Any = None) -> Float[Tensor, "batch length width"]:
        """What the head reads out behind each token: that of token i has seen tokens 0 to i. `route`: the way of the
        slots through the layers (`backbones.route.Route`)."""
        model, n = self.model, ids.shape[1]
        canvas = model.canvas({"token": F.pad(ids, (0, 1))}, self._given, layout=line(n + 1))
        plan = model.factorization.packed(canvas)
        assert plan is not None
        plan = plan if route is None else plan.along(route)
        return model.hidden(plan, canvas, None, self._encoded())[:, self._prefix :]

    def _encoded(self) -> Condition | None:
        """What texts depend on beside themselves."""
        return None

    @torch.no_grad()
    def log_prob(self, ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch"]:
        """Log-probability in nats of whole rows; where no learned start stands in front, given their first token."""
        return self.model.log_prob(self.canvas({"token": ids})[0])

    # ---- other programs ---------------------------------------------------------------------------

    @property
    def parts(self) -> tuple[Part, ...]:
        """Each parameter, and the published tensors it is made of. Raises ValueError where there are no such names."""
        raise ValueError(f"{self.meta.key} has no counterpart among published models")

    def publication(self) -> Publication:
        """The model as other programs read it. Raises ValueError where it has no counterpart there."""
        raise ValueError(f"{self.meta.key} has no counterpart in that format")

    # ---- generation -------------------------------------------------------------------------------------------------

    def own(self, sampling: Sampling, stop: tuple[int, ...]) -> Decoding:
        """How it decodes if no decoder is named: token by token. stop: ids that end a row."""
        return Decoding(SampleAll(stop))

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt] | Int[Tensor, "batch length"],
        decoder: str | Decoding = "ancestral",
        *,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical: float | None = None,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        suppress_tokens: Sequence[int | str] = (),
        begin_suppress_tokens: Sequence[int | str] = (),
        seed: int = 0,
        n: int = 1,
        stop: Sequence[int | str] | None = None,
        grammar: Grammar | None = None,
        stream: Callable[[str], None] | None = None,
        logprobs: bool = False,
        watch: Onlooker | None = None,
    ) -> Generation | list[Generation]:
        """Continue a text, its ids, or a batch of either, by a decoder (`decoder_of`); a list of generations for a
        batch, or where `n` of each prompt are asked for.

        temperature 0 is greedy; penalties: see `Penalties`; suppress_tokens, begin_suppress_tokens: ids, or tokens by
        name, that are not written, or not as the first new one (`Suppress`); stop: ids and strings that end a row
        (None: the model's own ids, which are also those beside strings); grammar: what the new text must be; stream:
        called with pieces of text, for one prompt, as they are decided for good; watch: who looks on
        (`evaluation.text_film.Recorder`). Raises ValueError for prompts that are empty or too long, and decoders that
        do not exist."""
        rows, many = self._rows(prompt)
        if stream is not None and (many or n > 1):
            raise ValueError("text is streamed for one prompt, not for a batch")
        strings, ends = self._ends(stop)
        s = Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical=typical,
            repetition_penalty=repetition_penalty, presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty, suppress_tokens=token_ids(self.tokenizer, suppress_tokens),
            begin_suppress_tokens=token_ids(self.tokenizer, begin_suppress_tokens),
        )  # fmt: skip
        if grammar is not None and not s.suppress.neutral:
            raise ValueError("a grammar says what may be written, and could ask for what is suppressed: leave one out")
        way = self.own(s, ends) if decoder == "own" else decoder_of(self, decoder, s, ends)
        way = way if watch is None else watch(way)
        target = self.target(None, s, **way.target)
        if grammar is not None:
            target.shapers += (Constraint(grammar.matchers(self.tokenizer, ends, n * len(rows))),)
        start = time.perf_counter()
        with torch.inference_mode():
            canvas = self._begun(rows, max_new_tokens)
            if not getattr(way.proposer, "reads_prompt", False):
                target.prefill(canvas, shared=n > 1)
            if n != 1:
                rows = [row for row in rows for _ in range(n)]
                self._copied(target, canvas, n)
            run = Run(self, canvas, rows, strings, stream, start, not getattr(way.decider, "redraws", False))
            for step in decode(target, canvas, way.decider, way.proposer, Keyed(seed)):
                if not run.after(step):
                    break
        out = run.generations(time.perf_counter() - start, logprobs)
        return out if many or n != 1 else out[0]

    def _ends(self, stop: Sequence[int | str] | None) -> tuple[list[str], tuple[int, ...]]:
        """Strings and ids that end a row; the model's own ids where none are given."""
        strings = [x for x in stop or () if isinstance(x, str)]
        if strings and self.tokenizer is None:
            raise ValueError("this model came without a tokenizer: strings cannot end what it writes; give ids as stop")
        ends = tuple(x for x in stop or () if not isinstance(x, str))
        return strings, self.stop if stop is None or (strings and not ends) else ends

    @staticmethod
    def _copied(target: Target, canvas: Canvas, n: int) -> None:
        """Each row n times, as rows of their own from here on."""
        if n < 1:
            raise ValueError(f"at least 1 generation of a prompt can be asked for, got n = {n}")
        select_rows(target, canvas, torch.arange(canvas.batch).repeat_interleave(n))
        canvas.row = torch.arange(canvas.batch)

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

    def scores(self, ids: list[int], new: int) -> list[float]:
        """Log-probabilities of the last `new` ids."""
        if not new:
            return []
        whole = torch.tensor([ids])
        said = torch.log_softmax(self.logits(whole)[0, -new - 1 : -1].float(), -1)
        return said.gather(1, whole[0, -new:, None])[:, 0].tolist()


class Run:
    """A batch while it is generated: counts, streamed text, rows that strings end."""

    def __init__(
        self, system: LanguageModel, canvas: Canvas, rows: Sequence[Sequence[int]], strings: Sequence[str],
        stream: Callable[[str], None] | None, start: float, firm: bool = True,
    ):  # fmt: skip
        """`firm`: what is decided stays, so that it can be streamed, and ended by strings, on the way."""
        self.system, self.canvas, self.rows, self.stream = system, canvas, rows, stream
        self.start, self.first = start, 0.0
        self.names = canvas.row.clone()
        self.forwards = 0
        self.drafted: int | Tensor = 0
        self.accepted: int | Tensor = 0
        self.sizes: list[int] = []  # of forwards, in rows
        self.drafting = 0.0
        self.firm = firm
        watched = bool(strings) or (stream is not None and system.tokenizer is not None)
        self.watches = [Watch(system.tokenizer, strings) for _ in rows] if watched else []

    def after(self, step: Step) -> bool:
        """Take a step in; does anything go on?"""
        if self.forwards:
            self.sizes.append(step.slots)
            self.drafting += step.drafting
        else:
            self.first = time.perf_counter() - self.start
            self.sizes.append(1 + int(torch.as_tensor(step.drafted).max()))
        self.forwards += step.forwards
        self.drafted, self.accepted = self.drafted + step.drafted, self.accepted + step.accepted
        if not self.firm:
            return True
        ended = [w.ended for w in self.watches]
        for b, watch in enumerate(self.watches):
            piece = watch.push(self.new(b, watch.count))
            if piece and self.stream is not None:
                self.stream(piece)
        now = [w.ended for w in self.watches]
        if now == ended:
            return True
        size = self.canvas.layout.size
        held = self.canvas.lengths()
        self.canvas.apply([Truncate(torch.where(torch.tensor(now), held, size))])
        return not all(now)

    def new(self, b: int, start: int = 0) -> list[int]:
        """What a row has got behind its prompt, from a place on; of several texts of it (beams) the best."""
        canvas, at = self.canvas, b
        if canvas.batch != len(self.rows):
            at = int((canvas.row == self.names[b]).nonzero()[0])
        end = canvas.length if canvas.length is not None else int(canvas.lengths()[at])
        return canvas.value["token"][at, len(self.rows[b]) + start : end].tolist()

    def generations(self, seconds: float, logprobs: bool) -> list[Generation]:
        """What came out, row by row."""
        out, tokenizer = [], self.system.tokenizer
        drafted, accepted = (torch.as_tensor(x).expand(len(self.rows)).tolist() for x in (self.drafted, self.accepted))
        for b, row in enumerate(self.rows):
            watch = self.watches[b] if self.watches else None
            ids = self.new(b)
            if watch is not None:
                rest = watch.push(self.new(b, watch.count)) + watch.rest()
                if rest and self.stream is not None:
                    self.stream(rest)
                ids = ids[: watch.count] if watch.ended else ids
            text = None if tokenizer is None else tokenizer.decode(ids)
            text = watch.text if watch is not None and watch.ended else text
            scores = self.system.scores([*row, *ids], len(ids)) if logprobs else None
            counts = self.forwards, drafted[b], accepted[b]
            out.append(Generation(ids, text, *counts, seconds, scores, self.first, tuple(self.sizes), self.drafting))
        return out
