# SPDX-License-Identifier: Apache-2.0
"""What a caller is told when a request cannot be answered, in OpenAI's error format."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """status: of HTTP. param: the field at fault, None if it is no single one. code: a word for programs. retry_after:
    seconds until another try makes sense, sent as a header."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def kind(self) -> str:
        """OpenAI's name for errors of this status."""
        named = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        return named.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class Overloaded(Exception):
    """The queue is full; `seconds`: when a place is likely to be free."""

    def __init__(self, waiting: int, seconds: int) -> None:
        super().__init__(f"{waiting} requests are waiting already; try again in {seconds} s")
        self.seconds = seconds


class TooLong(ValueError):
    """A request that this server can never hold."""


class Expired(Exception):
    """A request's deadline passed before its answer was finished."""


class NotANumber(Exception):
    """The model gave NaN for a request, whose answer would mean nothing."""


class Closed(Exception):
    """The server is shutting down and takes no further requests."""


def as_api_error(error: BaseException) -> ApiError:
    """The answer to whoever sent the request that `error` ended."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Overloaded):
        return ApiError(429, str(error), code="queue_full", retry_after=error.seconds)
    if isinstance(error, TooLong):
        return ApiError(413, str(error), code="context_length_exceeded")
    if isinstance(error, Expired):
        return ApiError(504, str(error), code="deadline_exceeded")
    if isinstance(error, NotANumber):
        return ApiError(500, str(error), code="not_a_number")
    if isinstance(error, Closed):
        return ApiError(503, str(error), code="shutting_down", retry_after=5)
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return ApiError(503, f"out of memory: {str(error).splitlines()[0]}" if str(error) else "out of memory",
                        code="out_of_memory", retry_after=5)  # fmt: skip
    if isinstance(error, ValueError):
        return ApiError(400, str(error))
    return _internal(error)


def as_fault(error: BaseException) -> ApiError:
    """As `as_api_error`, of an error that a request met while it was decoded: a ValueError is then none of its sender's."""
    return _internal(error) if isinstance(error, ValueError) else as_api_error(error)


def _internal(error: BaseException) -> ApiError:
    return ApiError(500, f"the request failed: {type(error).__name__}", code="internal_error")
