"""Chat templates of published models: messages in, the prompt their models were trained on out.

A template is a program that comes with a model, so nobody vouches for it. It is rendered by jinja2's immutable sandbox
in a process of its own (`chat_sandbox`), which knows neither our memory nor the environment's variables, and which the
operating system stops when it takes too long or too much.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SANDBOX = Path(__file__).with_name("chat_sandbox.py")
PROCESSOR_SECONDS, CLOCK_SECONDS = 2, 4  # a busy machine may make an honest template wait
MEMORY = 512 * 2**20  # bytes, of which Python itself takes less than a tenth
LENGTH = 1_000_000  # characters of a template, and of what it writes
TOGETHER = 100  # conversations that one process renders
# what Python needs to start and to know the day
ENVIRONMENT = ("SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")


@dataclass(frozen=True)
class ChatTemplate:
    """A template in jinja2, and the special tokens that it may name (`bos_token`: "<s>", ...)."""

    source: str
    tokens: Mapping[str, str]

    def __post_init__(self) -> None:
        if len(self.source) > LENGTH:
            raise ValueError(f"a chat template of {len(self.source):,} characters is none; at most {LENGTH:,} are read")

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True, **extra: Any) -> str:
        """The prompt of a conversation, as transformers' `apply_chat_template` writes it; special tokens stand in it as
        text. extra: more variables of the template, of JSON's types. Takes about a tenth of a second.

        Raises ValueError for messages that are none, and for a template that is broken, refuses the conversation (in
        its own words), or takes more than 2 seconds, 512 MB or a million characters.
        """
        (answer,) = self._render([(messages, add_generation_prompt)], extra)
        if isinstance(answer, ValueError):
            raise answer
        return answer

    def render_each(self, conversations: Sequence[tuple[Sequence[Mapping[str, str]], bool]]) -> list[str | ValueError]:
        """The same for many conversations, each with whether an answer is to begin, at about a millisecond each: their
        texts, or with what errors the template refuses them. Raises ValueError for messages that are none, and for a
        template that takes more than 2 seconds, or 512 MB, for a hundred of them."""
        parts = (conversations[i : i + TOGETHER] for i in range(0, len(conversations), TOGETHER))
        return [answer for part in parts for answer in self._render(part, {})]

    def _render(
        self, conversations: Sequence[tuple[Sequence[Mapping[str, str]], bool]], extra: Mapping[str, Any]
    ) -> list[str | ValueError]:
        said = {"tools": None, "documents": None, **self.tokens, **extra}
        each = [{"messages": checked(messages), "add_generation_prompt": begun} for messages, begun in conversations]
        limits = {"seconds": PROCESSOR_SECONDS, "memory": MEMORY, "length": LENGTH}
        try:
            request = json.dumps({"source": self.source, "variables": said, "each": each, **limits})
        except (TypeError, ValueError) as error:
            raise ValueError(f"variables of a chat template are of JSON's types: {error}") from None
        answers = _ask_sandbox(request)
        return [a["text"] if "text" in a else ValueError(f"the chat template fails: {a['error']}") for a in answers]


def _ask_sandbox(request: str) -> list[dict[str, str]]:
    """What the sandbox answers, or that it was stopped."""
    command = [sys.executable, "-I", str(SANDBOX), *filter(os.path.isabs, sys.path)]
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    try:
        done = subprocess.run(
            command, input=request.encode(), capture_output=True, timeout=CLOCK_SECONDS, env=environment
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"the chat template was stopped: it did not end within {CLOCK_SECONDS} seconds") from None
    if done.returncode < 0:  # by a signal: the limit of time, or a stack that ran over
        raise ValueError(
            f"the chat template was stopped: it takes more than {PROCESSOR_SECONDS} seconds or {MEMORY >> 20} MB"
        )
    if done.returncode:
        raise ValueError(f"the chat template was not rendered: {done.stderr.decode(errors='replace').strip()[-500:]}")
    return json.loads(done.stdout)


def checked(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Messages of a conversation. Raises ValueError for what is none."""
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise ValueError('a conversation is a list of messages: [{"role": "user", "content": "Hello"}]')
    for n, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f'message {n} is a {type(message).__name__}, not {{"role": ..., "content": ...}}')
        lacking = [key for key in ("role", "content") if key not in message]
        if lacking:
            raise ValueError(f"message {n} has no {' and no '.join(lacking)}")
        odd = [str(key) for key, value in message.items() if not (isinstance(key, str) and isinstance(value, str))]
        if odd:
            raise ValueError(f"message {n}: {', '.join(odd)} must be text")
    return [dict(message) for message in messages]


def read_template(folder: Path) -> ChatTemplate | None:
    """The template of a published model: of chat_template.jinja, or else of tokenizer_config.json, where among several
    it is the one called "default"; None where there is none. Raises ValueError for files that are broken."""
    config = _json(folder / "tokenizer_config.json")
    named = {**_json(folder / "special_tokens_map.json"), **config}
    tokens = {key: text for key, value in named.items() if key.endswith("_token") and (text := _content(value))}
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return ChatTemplate(file.read_text(encoding="utf-8"), tokens)
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no text in UTF-8 ({error})") from None
    source = config.get("chat_template")
    if isinstance(source, list):
        entries = (entry for entry in source if isinstance(entry, dict))
        source = next((entry.get("template") for entry in entries if entry.get("name") == "default"), None)
    if source is not None and not isinstance(source, str):
        raise ValueError(f"the chat_template of {folder / 'tokenizer_config.json'} is no text")
    return None if source is None else ChatTemplate(source, tokens)


def _content(token: Any) -> str | None:
    """The text of a token, which is a string or an object that holds it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error})") from None
    return said if isinstance(said, dict) else {}
