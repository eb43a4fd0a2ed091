"""How much one client may ask for, and the errors that say no, in the shape that OpenAI's clients read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limits:
    """body: bytes of a request; body_seconds: until it is there; seconds: of a whole request; open: requests at once;
    max_tokens: new tokens of a text; prompts: of a completion; texts: prompts times `n`; messages: of a conversation;
    grammar_bytes, grammar_seconds: of a JSON schema; pictures: of a request; picture_queue: requests for pictures that
    may wait; steps, side: of a picture, the latter in
    pixels; closing: seconds that running requests have to end when the server is shut down."""

    body: int = 1 << 20
    body_seconds: float = 30.0
    seconds: float = 600.0
    open: int = 512
    max_tokens: int = 4096
    prompts: int = 32
    texts: int = 32
    messages: int = 1024
    grammar_bytes: int = 32_768
    grammar_seconds: float = 5.0
    pictures: int = 8
    picture_queue: int = 16
    steps: int = 256
    side: int = 512
    closing: float = 6.0


class Refused(Exception):
    """What a client asked for is not done. status: of HTTP; param: the field that is wrong; code: a word for programs;
    kind: the type of error (None: as the status says); retry: seconds after which it may be tried again."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, kind: str | None = None,
        retry: int | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry = status, message, param, code, retry
        self.kind = kind or KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry is None else {"Retry-After": str(self.retry)}


KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 504: "timeout_error"}


def full(why: str) -> Refused:
    """Too much waits."""
    return Refused(429, f"the server is busy: {why}; try again later", code="rate_limit_exceeded", retry=1)


def closing() -> Refused:
    """The server takes nothing more."""
    return Refused(503, "the server is shutting down", code="shutting_down", retry=10)


def too_late(seconds: float) -> Refused:
    """It took longer than a request may."""
    return Refused(504, f"the request took longer than {seconds:g} seconds", code="timeout")


def as_json(value: Mapping[str, Any]) -> bytes:
    """JSON in UTF-8; halves of letters, which UTF-8 has no bytes for, are escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "backslashreplace")
