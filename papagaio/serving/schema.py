"""What requests may hold, and the errors that say what is wrong with one, in the form of OpenAI's API."""

import re
import secrets
from functools import cached_property
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from papagaio.batches.conversations import Message, check_turns
from papagaio.generation.options import SamplingOptions

BodyT = TypeVar("BodyT", bound="Body")
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
# Values of parameters of OpenAI's API that ask for what this server does anyway; any other value of them is refused.
NEUTRAL: dict[str, Any] = {
    "best_of": 1,
    "echo": False,
    "store": False,
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "tools": [],
    "tool_choice": "none",
    "service_tier": "auto",
}


class APIError(Exception):
    """An answer that is an error: its status, what is wrong, the parameter concerned, and a word for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def content(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class Body(BaseModel):
    """Base of all requests' bodies. Values are not converted; unknown parameters are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    model: str = Field(max_length=512)


Stop = Annotated[str, Field(min_length=1, max_length=512)]
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class StreamOptions(BaseModel):
    model_config = Body.model_config
    include_usage: bool = False


class Sampled(Body):
    """How answers are drawn and sent."""

    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field({}, max_length=4096)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] = []
    n: int = Field(1, ge=1, le=128)
    stream: bool = False
    stream_options: StreamOptions | None = None
    continue_ids: Ids | None = None  # token ids with which the answer begins; not part of OpenAI's API

    @model_validator(mode="after")
    def _check_sampled(self) -> Self:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options: needs stream")
        if wrong := next((key for key in self.logit_bias if not re.fullmatch(r"\d{1,9}", key)), None):
            raise ValueError(f"logit_bias: {wrong[:40]!r} is not a token id")
        return self

    @cached_property
    def first_seed(self) -> int:
        """The seed of the first choice; each further one has the next."""
        return secrets.randbits(62) if self.seed is None else self.seed % 2**63

    def options(self, temperature: float) -> SamplingOptions:
        """The sampling options; `temperature` is that of requests that name none."""
        return SamplingOptions(
            **self.model_dump(include={"top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"}),
            temperature=temperature if self.temperature is None else self.temperature,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            logit_bias=tuple(f"{key}={value:.6f}" for key, value in self.logit_bias.items()),
        )


class Part(BaseModel):
    model_config = Body.model_config
    type: Literal["text"]
    text: str


class Turn(BaseModel):
    """A message, as clients send it."""

    model_config = Body.model_config
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    @property
    def message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role="system" if self.role == "developer" else self.role, content=text)


def _messages(turns: list[Turn], last: str) -> list[Message]:
    messages = [turn.message for turn in turns]
    try:
        check_turns(messages, last)
    except ValueError as error:
        raise ValueError(f"messages: {error}") from None
    return messages


class ChatBody(Sampled):
    messages: list[Turn] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens: differs from max_completion_tokens, which means the same")
        _messages(self.messages, "user")
        return self

    @property
    def conversation(self) -> list[Message]:
        return _messages(self.messages, "user")

    @property
    def limit(self) -> int | None:
        return self.max_tokens or self.max_completion_tokens

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(Sampled):
    prompt: str | Ids | Annotated[list[str] | list[Ids], Field(min_length=1, max_length=128)]
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def limit(self) -> int | None:
        return self.max_tokens or 16

    @property
    def top(self) -> int | None:
        return self.logprobs


class EmbeddingBody(Body):
    input: str | Ids | Annotated[list[str] | list[Ids], Field(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] = "float"


class TokenizeBody(Body):
    prompt: str


class DetokenizeBody(Body):
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]


class DecodeBody(Body):
    """Codes of a picture or sound (papagaio/senses.py)."""

    text: str


class FeedbackBody(Body):
    """A rated answer, `messages` with `good`; or the better (chosen) and the worse (rejected) of two answers to `messages`."""

    messages: list[Turn] = Field(min_length=1)
    good: bool | None = None
    chosen: str | None = None
    rejected: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.good is None) == (self.chosen is None) or (self.chosen is None) != (self.rejected is None):
            raise ValueError("good: give either good, or chosen and rejected")
        if self.chosen is not None and self.chosen == self.rejected:
            raise ValueError("chosen: is the same as rejected")
        _messages(self.messages, "user" if self.good is None else "assistant")
        return self

    @property
    def row(self) -> dict[str, Any]:
        """A line of a file of finetune.py."""
        found = [message.model_dump(include={"role", "content"}) for message in (turn.message for turn in self.messages)]
        if self.good is not None:
            return {"messages": found, "label": self.good}
        return {"prompt": found, "chosen": self.chosen, "rejected": self.rejected}


def as_list(texts: Any) -> list[str] | list[list[int]]:
    """One text, or one list of ids, as a list of one."""
    return [texts] if isinstance(texts, str) or isinstance(texts[0], int) else texts


def read_body(kind: type[BodyT], content: bytes) -> BodyT:
    """A request's body. Raises APIError that names the parameter concerned."""
    try:
        values = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise APIError(400, f"the body is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise APIError(400, "the body must be a JSON object")
    values = {key: value for key, value in values.items() if value is not None}
    for key in values.keys() - kind.model_fields.keys():
        if key not in NEUTRAL or type(values[key]) is not type(NEUTRAL[key]) or values[key] != NEUTRAL[key]:
            raise APIError(400, f"{key[:80]}: this server has no such parameter", key[:80], "unsupported_parameter")
        del values[key]
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        place = [str(part) for part in first["loc"] if not re.search(r"[\[(-]|^str$|^list", str(part))]
        param = str(first["loc"][0]) if first["loc"] else message.split(":")[0]
        text = f"{'.'.join(place)}: {message}" if first["loc"] else message
        raise APIError(400, text, param, "missing_parameter" if first["type"] == "missing" else None) from None
