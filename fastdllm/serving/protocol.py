# SPDX-License-Identifier: Apache-2.0
"""Bodies of requests, checked field by field: what cannot be honoured is an error that names the field.

null is absent, everywhere. A field of OpenAI's that this server does not implement is accepted where its value asks for what
happens anyway (`presence_penalty: 0`, `tools: []`). Fields that are not OpenAI's are the numbers of decoding (`threshold`,
`top_k`, ...) and the options of the server, the latter at the server's own value.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Collection, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fastdllm import registry
from fastdllm.config import OPTIONS
from fastdllm.fields import LARGEST, LEAST_TEMPERATURE
from fastdllm.registry import Kind
from fastdllm.serving.errors import ApiError

SEED = 2**63
STOPS = 64  # stop strings of a request
ROLES = ("system", "developer", "user", "assistant")
# What OpenAI knows and this server does not, with the values that change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "metadata": ({},),
    "web_search_options": (),
    "best_of": (1,),
    "suffix": ("",),
}
ALSO_OPTIONS = ("suffix",)  # OpenAI's is a text; the caches' option of that name is a number


def encodable(value: Any) -> Any:
    """The body as it is, unless it holds half of a surrogate pair, which is no character and cannot be sent back."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise ApiError(400, "the body holds half of a surrogate pair, which is no character", code="invalid_text") from error
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body is nested too deeply or holds a number too long", code="invalid_json") from error
    return value


class Strict(BaseModel):
    """No guessed types, no infinities, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, value: Any) -> Any:
        """An answer that a client sends back carries many nulls (`refusal`, `tool_calls`, ...)."""
        return {k: v for k, v in value.items() if v is not None and v != []} if isinstance(value, dict) else value

    def plain(self) -> dict[str, str]:
        """As chat templates take it: one text; `developer` is the newer name of `system`."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Strict):
    include_usage: bool = False
    include_denoising: bool = False
    include_obfuscation: Literal[False] = False


class Body(BaseModel):
    """What chat and completions share. Whatever is not declared lands in `others`, and is checked by the service."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=LARGEST)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    seed: int | None = Field(None, ge=-SEED, lt=SEED)
    n: int = Field(1, ge=1, le=128)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    constraints: dict[str, str | int] | None = Field(None, max_length=4096)
    timeout: float | None = Field(None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def null_is_absent(cls, value: Any) -> Any:
        encodable(value)
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value

    @field_validator("temperature")
    @classmethod
    def temperature_divides(cls, value: float | None) -> float | None:
        if value is not None and 0 < value < LEAST_TEMPERATURE:
            raise ValueError(f"must be 0 or at least {LEAST_TEMPERATURE:g}")
        return value

    @field_validator("stop")
    @classmethod
    def stop_strings_say_something(cls, value: Any) -> Any:
        if "" in ([value] if isinstance(value, str) else value or []):
            raise ValueError("a stop string must not be empty")
        if isinstance(value, list) and len(value) > STOPS:
            raise ValueError(f"{len(value)} stop strings are more than {STOPS}")
        return value

    @model_validator(mode="after")
    def stream_options_need_a_stream(self) -> Body:
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is only allowed with stream=true", "stream_options")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def length(self) -> int | None:
        return self.max_tokens

    @property
    def top_alternatives(self) -> int | None:
        """How many alternatives to list per token; None: no log-probabilities at all."""
        return None

    def others(self) -> dict[str, Any]:
        """Fields that are not declared; raises where one is OpenAI's and asks for what is not there."""
        rest = {}
        for name, value in (self.model_extra or {}).items():
            if name not in NEUTRAL or (name in ALSO_OPTIONS and isinstance(value, int | float)):
                rest[name] = value
            elif not any(value == same and isinstance(value, bool) == isinstance(same, bool) for same in NEUTRAL[name]):
                raise ApiError(400, f"{name} is not supported by this server", name, "unsupported_parameter")
        return rest


class ChatBody(Body):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def fields_agree(self) -> ChatBody:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs is only allowed with logprobs=true", "top_logprobs")
        return self

    @property
    def length(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top_alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(Body):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool = False

    @property
    def top_alternatives(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        prompt: Any = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return [prompt]
        return prompt


class QuestionBody(Strict):
    name: str = Field(min_length=1)
    type: Literal["choice", "yes_no", "score"]
    options: list[str | int | float] | None = None
    text: str | None = None


class DecideBody(Strict):
    model: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    prompt: str | list[int] | None = None
    questions: list[QuestionBody] = Field(min_length=1, max_length=256)
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def null_is_absent(cls, value: Any) -> Any:
        encodable(value)
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def one_prompt(self) -> DecideBody:
        if (self.messages is None) == (self.prompt is None):
            raise ApiError(400, "give either messages or prompt", "prompt" if self.messages else "messages")
        return self


def numbers(others: Mapping[str, Any], allowed: Collection[str], options: Mapping[str, Any]) -> dict[str, float]:
    """The per-request numbers among `others`.

    allowed: their names. options: the server's own, by name; one of them may be repeated at the value that it has.
    Everything else is an `ApiError` that names the field.
    """
    found = {}
    for name, value in others.items():
        if name in allowed:
            if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
                raise ApiError(400, f"{name} must be a finite number", name)
            found[name] = float(value)
        elif name in options:
            if value != options[name] or isinstance(value, bool) != isinstance(options[name], bool):
                here = "" if options[name] is None else f"; here it is {options[name]!r}"
                raise ApiError(400, f"{name} is fixed when the server starts{here}", name, "fixed_parameter")
        elif name in NEUTRAL:
            raise ApiError(400, f"{name} is not supported by this server", name, "unsupported_parameter")
        elif _is_option(name):
            raise ApiError(400, f"{name} is fixed when the server starts; here it is not given", name, "fixed_parameter")
        else:
            known = [*allowed, *options, *ChatBody.model_fields, *CompletionBody.model_fields, *NEUTRAL]
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ApiError(400, f"unknown field {name[:80]!r}{hint}", name[:80], "unknown_parameter")
    return found


def _is_option(name: str) -> bool:
    """Whether decoding has an option of that name, with whatever decoder and cache."""
    owners = ((kind, owner) for kind in (Kind.DECODERS, Kind.CACHES) for owner in registry.names(kind))
    return name in OPTIONS or any(name in registry.settable(kind, owner) for kind, owner in owners)


def _finite(value: int | float) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def describe(error: ValidationError | Any) -> ApiError:
    """pydantic's findings as one error: the first field that is wrong, where it is, and why."""
    found = [(e, [part for part in e["loc"] if part != "body"]) for e in error.errors()]
    # Of the alternatives of a field (a text or a list of texts) the one that got furthest says best what is wrong.
    field = _path(found[0][1])
    first, names = max((e for e in found if _path(e[1]).startswith(field)), key=lambda e: len(e[1]))
    field = _path(names)
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON", code="invalid_json")
    if first["type"] in ("model_attributes_type", "dict_type", "missing") and not names:
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")
    code = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}.get(first["type"])
    if first["type"] == "extra_forbidden":
        reason = "unknown field"
    return ApiError(400, f"{field}: {reason}"[:500], field, code)


def _path(names: list[Any]) -> str:
    """messages[0].content; pydantic's own names of alternatives (`str`, `list[str]`) are left out."""
    out = ""
    for name in names:
        if isinstance(name, int):
            out += f"[{name}]"
        elif name.isidentifier() and name not in ("str", "int", "float", "constrained"):
            out += f".{name}" if out else name
        elif not name.isidentifier() and "[" not in name:
            out += f".{name!r}"[:60]
    return out or "body"
