"""Requests in the form of OpenAI's interface, as far as it is met; fields that are not known are passed over."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, StrictBool, StrictInt, StrictStr


def _whole(text: str) -> str:
    """JSON can name half a letter, which is no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be text in Unicode, without halves of surrogate pairs") from None
    return text


Text = Annotated[StrictStr, AfterValidator(_whole)]
Name = Annotated[Text, Field(min_length=1, max_length=512)]
Id = Annotated[StrictInt, Field(ge=0, lt=2**31)]
Seed = Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)]
Ids = Annotated[list[Id], Field(fail_fast=True)]
Count = Annotated[StrictInt, Field(ge=1, le=2**31 - 1)]


def _number(value: Any) -> Any:
    if isinstance(value, bool | str):
        raise ValueError("must be a number")
    return value


def _several(value: Any) -> Any:
    """One stop string stands for a list of one."""
    return [value] if isinstance(value, str) else value


Number = BeforeValidator(_number)
Penalty = Annotated[float, Number, Field(ge=-2, le=2, allow_inf_nan=False)]
Stop = Annotated[Text, Field(min_length=1, max_length=256)]


class StreamOptions(BaseModel):
    """include_usage: a last event tells how many tokens there were."""

    include_usage: StrictBool = False


class Schema(BaseModel):
    """A JSON schema by name."""

    name: StrictStr = ""
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")


class Format(BaseModel):
    """What form the text has."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None


class TextRequest(BaseModel):
    """What both forms of text have in common. Settings that are left out are the model's own. decoder: one of those
    that the server was started with; drafted: tell which parts of a streamed text had been drafted, and how many tokens
    there are so far."""

    model: Name
    n: Annotated[StrictInt, Field(ge=1, le=128)] | None = None
    stop: Annotated[list[Stop], BeforeValidator(_several), Field(max_length=4)] | None = None
    seed: Seed | None = None
    temperature: Annotated[float, Number, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Number, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    max_tokens: Count | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    response_format: Format | None = None
    decoder: Annotated[Text, Field(max_length=512)] | None = None
    drafted: StrictBool = False
    logit_bias: dict[str, float] | None = None


class CompletionRequest(TextRequest):
    """A text, or ids, to be continued; or a list of either."""

    prompt: Text | Ids | Annotated[list[Text], Field(fail_fast=True)] | Annotated[list[Ids], Field(fail_fast=True)]
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    echo: StrictBool | None = None
    suffix: StrictStr | None = None
    best_of: StrictInt | None = None


class Part(BaseModel):
    """A part of what a message says."""

    type: StrictStr
    text: Text | None = None


class Message(BaseModel):
    """Who says what."""

    role: Annotated[Text, Field(min_length=1, max_length=64)]
    content: Text | list[Part] | None = None


class ChatRequest(TextRequest):
    """A conversation that the model answers."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    max_completion_tokens: Count | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None


class ImageRequest(BaseModel):
    """Pictures of a class, by its name or number. steps: of decoding, where a system leaves a choice; stream: events
    that show how they were drawn."""

    model: Name
    prompt: Annotated[Text, Field(max_length=256)] = ""
    n: Annotated[StrictInt, Field(ge=1, le=128)] | None = None
    size: Annotated[StrictStr, Field(max_length=32)] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    seed: Seed | None = None
    steps: Count | None = None
    temperature: Annotated[float, Number, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    guidance: Annotated[float, Number, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    stream: StrictBool | None = None
