"""OpenAI's requests and answers as JSON: what is understood, what is refused, and in which words."""

import json
import time
import uuid
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llm.corpus.conversations import Turn
from llm.generate.generator import Writing
from llm.generate.sampling import Sampling

MAX_MESSAGES = 2000
HARMLESS = {
    "n": (1,), "best_of": (1,), "echo": (False,), "logprobs": (False, 0), "top_logprobs": (0,), "presence_penalty": (0,), "suffix": ("",),
    "frequency_penalty": (0,), "logit_bias": ({},), "tools": ([],), "functions": ([],), "modalities": (["text"],),
    "response_format": ({"type": "text"},),
}  # fmt: skip
"""Fields that change an answer in ways we do not offer, with the values that ask for nothing. Any others are left unread."""


class ApiError(Exception):
    """What a client is told instead of an answer, in OpenAI's form."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        kinds = {403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


Text = Annotated[str, Field(max_length=10**7)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]


class TextPart(BaseModel):
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=100)]

    def turn(self) -> Turn:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Turn("system" if self.role == "developer" else self.role, content)


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class Request(BaseModel):
    """What both kinds of request have in common; top_k, min_p and repetition_penalty are additions that other servers know too."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    model: Annotated[str, Field(max_length=300)] = ""
    max_tokens: Annotated[int, Field(ge=1, le=10**9)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=10**9)] | None = None
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=10**9)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def sampling(self, default: Sampling) -> Sampling:
        """`default` where the request says nothing."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        return Sampling(**{name: getattr(default if getattr(self, name) is None else self, name) for name in names})

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatRequest(Request):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


class CompletionRequest(Request):
    prompt: Annotated[Text, Field(min_length=1)] | Annotated[list[Annotated[Text, Field(min_length=1)]], Field(min_length=1, max_length=1)]


def parse(body: bytes, kind: type[Request]) -> Request:
    """Raises ApiError for anything but a request that can be answered."""
    try:
        fields = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON in UTF-8: {str(error)[:200]}") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body should be a JSON object")
    try:
        request = kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part)[:50] for part in first["loc"][:6])
        raise ApiError(400, f"{place}: {first['msg']}", param=place) from None
    for name, harmless in HARMLESS.items():
        if (request.model_extra or {}).get(name) not in (None, *harmless):
            raise ApiError(400, f"{name}: is not offered here", param=name, code="unsupported_parameter")
    return request


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


class Reply:
    """The answer to one request: whole, or as chunks of a stream."""

    def __init__(self, is_chat: bool, model: str):
        self._is_chat = is_chat
        self._head = {"id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, text: str, writing: Writing) -> dict:
        said = {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
        choice = {"index": 0, **said, "finish_reason": writing.finish_reason, "logprobs": None}
        return self._head | {"object": "chat.completion" if self._is_chat else "text_completion", "choices": [choice], "usage": usage(writing)}

    def chunk(self, text: str | None, finish_reason: str | None = None, first: bool = False) -> dict:
        delta = ({"role": "assistant"} if first else {}) | ({} if text is None else {"content": text})
        said = {"delta": delta} if self._is_chat else {"text": text or ""}
        choice = {"index": 0, **said, "finish_reason": finish_reason, "logprobs": None}
        return self._head | {"object": "chat.completion.chunk" if self._is_chat else "text_completion", "choices": [choice]}

    def usage_chunk(self, writing: Writing) -> dict:
        return self.chunk(None) | {"choices": [], "usage": usage(writing)}


def usage(writing: Writing) -> dict:
    return {"prompt_tokens": writing.n_prompt, "completion_tokens": writing.n_tokens, "total_tokens": writing.n_prompt + writing.n_tokens}
