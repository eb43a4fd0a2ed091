"""The two forms of text in OpenAI's interface: what a request asks of a model, and how the answer is told."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any, ClassVar

from seriatim.interop.grammar import Grammar
from seriatim.serving.limits import Limits, Refused, closing
from seriatim.serving.openai import ChatRequest, CompletionRequest, Format, TextRequest
from seriatim.serving.request import Request
from seriatim.serving.texts import Choice, Delta, Job, Scored, TextModel
from seriatim.serving.wording import Wording
from seriatim.systems.system import Sampling
from seriatim.verbs.generate import sampling_of

SHORT = 4096  # letters of a prompt that are made ids at once; longer ones in a thread
COMPACT = {"x-guidance": {"whitespace_flexible": False}}  # a small model would write spaces for ever
COMPLETION = 16  # new tokens where nothing is said, as OpenAI has it


class Form:
    """One form of a request for text. pool: threads for templates, long prompts and grammars."""

    word: ClassVar[str]  # what ids of answers begin with
    given: ClassVar[str]  # the field of what is continued
    object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, asked: TextRequest, model: TextModel, limits: Limits, pool: Executor):
        self.asked, self.model, self.limits, self.pool = asked, model, limits, pool
        self.id = f"{self.word}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.wording = Wording(model.system.tokenizer)

    # ---- what is asked -----------------------------------------------------------------------------------------------

    async def begin(self, job: Job) -> None:
        """Queue all texts. Raises Refused."""
        self.check()
        prompts = await self.prompts()
        n = self.asked.n or 1
        if len(prompts) * n > self.limits.texts:
            raise Refused(
                400, f"{len(prompts)} prompts and n = {n} are {len(prompts) * n} texts; at most {self.limits.texts}",
                param="n",
            )  # fmt: skip
        decoder = self.asked.decoder
        if decoder is not None and decoder not in self.model.engine.decoders:
            there = ", ".join(self.model.engine.decoders)
            raise Refused(400, f"there is no decoder {decoder!r} here; there is {there}", param="decoder")
        grammars = await self._grammars(len(prompts) * n)
        seed = secrets.randbelow(2**31) if self.asked.seed is None else self.asked.seed
        sampling = self._sampling()
        for i, ids in enumerate(prompts):
            new = self._new_tokens(len(ids))
            for copy in range(n):
                ask = Request(tuple(ids), new, sampling, seed, copy, decoder, None, self.scores)
                if grammars:
                    ask = replace(ask, grammar=grammars[i * n + copy])
                job.submit(i, ask, self.asked.stop or ())
            job.prompts.append(len(ids))

    def check(self) -> None:
        """Raises Refused for what is known, and not done here."""
        if self.asked.logit_bias:
            raise Refused(400, "logit_bias is not done here", param="logit_bias", code="unsupported_parameter")

    async def prompts(self) -> list[list[int]]:
        """Ids of each prompt. Raises Refused."""
        raise NotImplementedError

    @property
    def scores(self) -> int | None:
        """How many likely tokens are told beside each; None: no log-probabilities."""
        raise NotImplementedError

    @property
    def wanted(self) -> tuple[int | None, str]:
        """New tokens that are asked for, and the field that says so."""
        return self.asked.max_tokens, "max_tokens"

    default: ClassVar[int | None] = None  # new tokens where nothing is said; None: as many as there is room for

    def _new_tokens(self, prompt: int) -> int:
        wanted, field = self.wanted
        room = self.model.room - prompt
        if wanted is not None and wanted > self.limits.max_tokens:
            raise Refused(
                400, f"{field} is {wanted:,}; at most {self.limits.max_tokens:,} tokens are written here", param=field
            )
        if room < (wanted or 1):
            raise Refused(
                400, f"the prompt has {prompt:,} tokens, {wanted or 1:,} more are asked for, and this model takes "
                f"{self.model.room:,} in all", param=field if wanted else self.given, code="context_length_exceeded",
            )  # fmt: skip
        return wanted or min(room, self.limits.max_tokens, self.default or room)

    def _sampling(self) -> Sampling:
        asked = self.asked
        return sampling_of(
            self.model.system, temperature=asked.temperature, top_p=asked.top_p,
            presence_penalty=asked.presence_penalty, frequency_penalty=asked.frequency_penalty,
        )  # fmt: skip

    async def _grammars(self, count: int) -> list[Any]:
        """What each text must be; nothing where it is free."""
        grammar = grammar_of(self.asked.response_format, self.limits)
        if grammar is None:
            return []
        system = self.model.system
        try:
            made = await asyncio.wait_for(
                self._apart(grammar.matchers, system.tokenizer, system.stop, count), self.limits.grammar_seconds
            )
        except TimeoutError:
            why = f"the schema was given up: it did not compile within {self.limits.grammar_seconds:g} seconds"
            raise Refused(400, why, param="response_format") from None
        except (ValueError, ImportError, RecursionError) as error:
            raise Refused(400, str(error), param="response_format") from None
        return [Made(matcher) for matcher in made]

    async def _apart(self, function: Any, *arguments: Any) -> Any:
        """In a thread, so that streams go on."""
        try:
            task = asyncio.get_running_loop().run_in_executor(self.pool, function, *arguments)
        except RuntimeError:  # no threads are given out any more
            raise closing() from None
        return await task

    # ---- how it is told ----------------------------------------------------------------------------------------------

    def whole(self, choices: Sequence[tuple[Choice, str, list[Scored]]], job: Job) -> dict[str, Any]:
        """The answer, all at once."""
        told = [self.choice(choice, text, scored) for choice, text, scored in choices]
        return {**self._head(self.object), "choices": told, "usage": usage(job)}

    def chunk(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        """An event of a stream."""
        told = {**self._head(self.chunk_object), "choices": [self.part(choice, delta)]}
        if self.tells_usage:
            told["usage"] = None
        if self.asked.drafted:
            parts = [[text, drafted] for text, drafted in delta.parts]
            told["drafted"] = {"parts": parts, "tokens": choice.tokens, "accepted": choice.accepted}
        return told

    @property
    def tells_usage(self) -> bool:
        """Does a stream tell how many tokens there were?"""
        return self.asked.stream_options is not None and self.asked.stream_options.include_usage

    def first(self, choice: Choice) -> dict[str, Any] | None:
        """An event before anything is written, if there is one."""
        return None

    def last(self, job: Job) -> dict[str, Any] | None:
        """An event behind everything, if it was asked for."""
        if not self.tells_usage:
            return None
        return {**self._head(self.chunk_object), "choices": [], "usage": usage(job)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model.name}

    def choice(self, choice: Choice, text: str, scored: list[Scored]) -> dict[str, Any]:
        raise NotImplementedError

    def part(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        raise NotImplementedError


class Completion(Form):
    """A text that goes on."""

    word, given, object, chunk_object = "cmpl", "prompt", "text_completion", "text_completion"
    default = COMPLETION
    asked: CompletionRequest

    def check(self) -> None:
        super().check()
        if self.asked.echo:
            raise Refused(400, "echo is not done here: put the prompt in front", param="echo")
        if self.asked.suffix:
            raise Refused(400, "suffix is not done here", param="suffix")
        if (self.asked.best_of or 1) > (self.asked.n or 1):
            raise Refused(400, "best_of is not done here: ask for n, and choose", param="best_of")

    async def prompts(self) -> list[list[int]]:
        said, system = self.asked.prompt, self.model.system
        several = isinstance(said, list) and not all(isinstance(x, int) for x in said)
        each: list[Any] = list(said) if several else [said]
        if len(each) > self.limits.prompts:
            raise Refused(400, f"{len(each)} prompts; at most {self.limits.prompts}", param="prompt")
        out = []
        for prompt in each:
            if isinstance(prompt, str):
                long = len(prompt) > SHORT
                prompt = await self._apart(system.prompt_ids, prompt) if long else system.prompt_ids(prompt)
            if not prompt:
                raise Refused(400, "the prompt is empty: give at least one token", param="prompt")
            out.append(prompt)
        return out

    @property
    def scores(self) -> int | None:
        return self.asked.logprobs

    def choice(self, choice: Choice, text: str, scored: list[Scored]) -> dict[str, Any]:
        told = None if self.scores is None else self._logprobs(scored, 0)
        return {"index": choice.index, "text": text, "logprobs": told, "finish_reason": choice.finish}

    def part(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        told = self._logprobs(delta.scored, choice.watch.told - len(delta.text)) if delta.scored else None
        return {"index": choice.index, "text": delta.text, "logprobs": told, "finish_reason": delta.finish}

    def _logprobs(self, scored: Sequence[Scored], start: int) -> dict[str, Any]:
        """As lists; offsets count letters of the text, from `start` on."""
        names = [self.wording.text(s.id) for s in scored]
        offsets = [start]
        for name in names:
            offsets.append(offsets[-1] + len(name))
        tops = [{self.wording.text(i): x for i, x in s.top} for s in scored]
        return {
            "tokens": names, "token_logprobs": [finite(s.logprob) for s in scored], "text_offset": offsets[:-1],
            "top_logprobs": [{k: finite(x) for k, x in top.items()} for top in tops] if self.scores else None,
        }  # fmt: skip


class Chat(Form):
    """A conversation that is answered."""

    word, given, object, chunk_object = "chatcmpl", "messages", "chat.completion", "chat.completion.chunk"
    asked: ChatRequest

    def check(self) -> None:
        super().check()
        for field in ("tools", "functions"):
            if getattr(self.asked, field):
                raise Refused(400, f"{field} are not done here", param=field, code="unsupported_parameter")
        if self.asked.top_logprobs and not self.asked.logprobs:
            raise Refused(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        if len(self.asked.messages) > self.limits.messages:
            raise Refused(400, f"at most {self.limits.messages} messages are read", param="messages")
        if getattr(self.model.system, "chat", None) is None:
            raise Refused(
                400, f"{self.model.name} has no chat template: it was not trained to converse; ask for a completion",
                param="model", code="no_chat_template",
            )  # fmt: skip

    async def prompts(self) -> list[list[int]]:
        messages = [{"role": m.role, "content": said(m.content)} for m in self.asked.messages]
        try:
            return [await self._apart(self.model.system.chat_ids, messages)]
        except ValueError as error:
            raise Refused(400, str(error), param="messages") from None

    @property
    def scores(self) -> int | None:
        return (self.asked.top_logprobs or 0) if self.asked.logprobs else None

    @property
    def wanted(self) -> tuple[int | None, str]:
        if self.asked.max_completion_tokens is not None:
            return self.asked.max_completion_tokens, "max_completion_tokens"
        return super().wanted

    def choice(self, choice: Choice, text: str, scored: list[Scored]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        told = None if self.scores is None else self._logprobs(scored)
        return {"index": choice.index, "message": message, "logprobs": told, "finish_reason": choice.finish}

    def first(self, choice: Choice) -> dict[str, Any]:
        begun = {"index": choice.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        told = {**self._head(self.chunk_object), "choices": [{**begun, "logprobs": None}]}
        return {**told, "usage": None} if self.tells_usage else told

    def part(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        new = {"content": delta.text} if delta.text else {}
        told = self._logprobs(delta.scored) if delta.scored else None
        return {"index": choice.index, "delta": new, "logprobs": told, "finish_reason": delta.finish}

    def _logprobs(self, scored: Sequence[Scored]) -> dict[str, Any]:
        content = [{**self._token(s.id, s.logprob), "top_logprobs": [self._token(*t) for t in s.top]} for s in scored]
        return {"content": content, "refusal": None}

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self.wording.text(id), "logprob": finite(logprob), "bytes": self.wording.bytes(id)
        }  # fmt: skip


def said(content: Any) -> str:
    """What a message says, its parts one after another. Raises Refused for parts that are no text."""
    if content is None or isinstance(content, str):
        return content or ""
    other = next((part.type for part in content if part.type != "text"), None)
    if other is not None:
        raise Refused(400, f"messages are text here, and a part is {other[:64]!r}", param="messages")
    return "".join(part.text or "" for part in content)


def usage(job: Job) -> dict[str, Any]:
    """How many tokens there were; a prompt counts once, however many texts continue it."""
    prompt, written = sum(job.prompts), sum(choice.tokens for choice in job.choices)
    reused: dict[int, int] = {}
    for choice in job.choices:
        reused.setdefault(choice.prompt, choice.reused)
    return {
        "prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": sum(reused.values())},
    }  # fmt: skip


def finite(logprob: float) -> float:
    """JSON knows no infinity: -9999 is what OpenAI gives for what is all but impossible."""
    return max(logprob, -9999.0)


class Made:
    """A grammar that was compiled for one text."""

    def __init__(self, matcher: Any):
        self.matcher = matcher

    def matchers(self, tokenizer: Any, stop: tuple[int, ...], rows: int) -> list[Any]:
        """As of `Grammar`. Raises ValueError for more than the one text."""
        if rows != 1:
            raise ValueError(f"this was compiled for one text, and {rows} are asked for")
        return [self.matcher]


def grammar_of(form: Format | None, limits: Limits) -> Grammar | None:
    """What the form of a text means. Raises Refused for a schema that lacks or is too large."""
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return Grammar("json_schema", json.dumps({"type": "object", **COMPACT}))
    if form.json_schema is None:
        raise Refused(400, "a response_format json_schema needs json_schema: {name, schema}", param="response_format")
    try:
        source = json.dumps({**COMPACT, **form.json_schema.schema_})
    except RecursionError:
        raise Refused(400, "the schema is nested too deeply", param="response_format") from None
    if len(source) > limits.grammar_bytes:
        why = f"the schema has {len(source):,} bytes; at most {limits.grammar_bytes:,} are compiled"
        raise Refused(400, why, param="response_format")
    return Grammar("json_schema", source)
