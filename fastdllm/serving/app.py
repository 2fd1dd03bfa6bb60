# SPDX-License-Identifier: Apache-2.0
"""The HTTP side: OpenAI's endpoints over a `Service`, and nothing that decides anything about decoding."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

import fastdllm
from fastdllm.serving.address import check_key, host_name
from fastdllm.serving.errors import ApiError, as_api_error
from fastdllm.serving.page import Page, PageBody, WordsBody
from fastdllm.serving.protocol import SEED, Body, ChatBody, CompletionBody, DecideBody, describe
from fastdllm.serving.responses import Asked
from fastdllm.serving.service import Service

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("fastdllm.serving")
T = TypeVar("T")
B = TypeVar("B", bound=Body)
MAX_BODY = 8 * 2**20  # bytes; a longer body is refused before it is read
STATIC = Path(__file__).parent / "static"
# What the page may do: load its own files and talk to its own server. Nothing inline, nothing framed, no form sent anywhere.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
GONE = 499  # the client closed the connection: nobody reads this, logs and metrics do


def create_app(
    service: Service,
    *,
    others: Sequence[Service] = (),
    api_key: str | None = None,
    hosts: Sequence[str] | None = None,
    wait_until_warm: bool = False,
) -> FastAPI:
    """The application.

    service: answers under /v1. others: further models that the page offers. api_key: what clients must send as a bearer
    token under /v1 and /page, None for no key. hosts: names under which the server may be addressed, None for any; a server
    on the loopback interface names its own, so that no web page can reach it under a name that it pointed there.
    wait_until_warm: listen only then; else /health says so meanwhile.

    Raises ValueError for a key or a name that no request can have.
    """
    hosts = None if hosts is None else tuple(map(host_name, hosts))
    if api_key is not None:
        check_key(api_key)
    page = Page([service, *others])

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        page.start()
        warming = asyncio.create_task(_warm(page, service))
        if wait_until_warm:
            await warming
        yield
        warming.cancel()
        with suppress(asyncio.CancelledError):
            await warming
        await asyncio.to_thread(page.close)

    app = FastAPI(
        title="fastdllm",
        version=fastdllm.__version__,
        description="OpenAI-compatible server for diffusion language models",
        lifespan=lifespan,
        docs_url=None,  # these pages load scripts from other servers; /openapi.json says the same
        redoc_url=None,
    )
    app.state.service, app.state.page = service, page
    app.add_middleware(Gate, api_key=api_key, hosts=hosts, metrics=service.metrics)
    _add_error_handlers(app)
    _add_operations(app, service)
    _add_endpoints(app, service)
    _add_page(app, page)
    return app


async def _warm(page: Page, service: Service) -> None:
    try:
        await page.warm_up()
    except ApiError as error:
        log.error("the model could not be warmed up: %s", error)
        service.state = "failed"


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.get("/health", tags=["operation"])
    async def health() -> Response:
        """200 as soon as the model is warm; 503 before that, during shutdown, and when the device is lost."""
        state = service.health
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @app.get("/metrics", tags=["operation"])
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _add_endpoints(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", tags=["OpenAI"])
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return service.models()

    @app.get("/v1/models/{name:path}", tags=["OpenAI"])
    async def model(name: str) -> dict[str, Any]:
        """The same, by its name."""
        if name != service.name:
            raise ApiError(
                404, f"the model {name[:100]!r} does not exist; here is {service.name!r}", "model", "model_not_found"
            )
        return service.models()["data"][0]

    @app.post("/v1/chat/completions", tags=["OpenAI"])
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        return await _respond(service, request, body.stream, service.chat(_seeded(service, body)))

    @app.post("/v1/completions", tags=["OpenAI"])
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue a text, several texts, or token ids."""
        return await _respond(service, request, body.stream, service.completions(_seeded(service, body)))

    @app.post("/v1/decide", tags=["typed answers"])
    async def decisions(body: DecideBody, request: Request) -> Response:
        """Answer typed questions (choice, yes or no, score) with probabilities, from one forward."""
        return JSONResponse(await _while_connected(request, service.decide(body)))


def _seeded(service: Service, body: B) -> B:
    """The body with a seed. Without one, of its own or of the server's options, it gets a new one: two requests that are
    alike draw different tokens, as OpenAI's do."""
    if body.seed is None and "seed" not in service.config.given():
        body.seed = secrets.randbelow(SEED)
    return body


def _add_page(app: FastAPI, page: Page) -> None:
    @app.get("/page/info", tags=["page"])
    async def info() -> dict[str, Any]:
        """Models, settings and examples to choose from."""
        return page.info()

    @app.post("/page/words", tags=["page"])
    async def words(body: WordsBody) -> dict[str, Any]:
        """Where words at token positions will stand."""
        return page.words(body)

    @app.post("/page/chat", tags=["page"])
    async def chat(body: PageBody, request: Request) -> Response:
        """Answer a conversation under any setting: the events of a streamed chat, with the history of the answer."""
        return await _stream(request, page.chat(body))

    files = PageFiles(directory=STATIC)

    async def file(request: Request) -> Response:
        return await files.get_response(request.url.path.removeprefix("/") or "index.html", request.scope)

    # A route for each instead of a mount, which would take every address that no other route took, for any method.
    for path in ("", *sorted(known.name for known in STATIC.iterdir())):
        app.add_api_route(f"/{path}", file, methods=["GET", "HEAD"], include_in_schema=False)


class PageFiles(StaticFiles):
    """The page's files, which browsers ask for anew when they have changed, and its policy."""

    def file_response(self, *args: Any, **options: Any) -> Response:
        response = super().file_response(*args, **options)
        response.headers.update({
            "Content-Security-Policy": POLICY,
            "Cache-Control": "no-cache",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        })  # fmt: skip
        return response


async def _respond(service: Service, request: Request, stream: bool, asking: Awaitable[Asked]) -> Response:
    if not stream:
        return JSONResponse(await _while_connected(request, _answer(service, asking)))
    return await _stream(request, service.chunks(await _while_connected(request, asking)))


async def _stream(request: Request, chunks: AsyncGenerator[dict[str, Any], None]) -> Response:
    try:
        # What goes wrong before anything was sent is an error with a status of its own.
        first = await _while_connected(request, anext(chunks))
    except BaseException:
        await chunks.aclose()
        raise
    return EventStream(first, chunks)


class EventStream(StreamingResponse):
    """Server-sent events of a response whose first chunk is there. However it ends, the chunks are closed: a client may hang
    up before a single event was sent, and then nobody has begun to read them."""

    def __init__(self, first: dict[str, Any], chunks: AsyncGenerator[dict[str, Any], None]) -> None:
        super().__init__(_events(first, chunks), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._chunks.aclose()


async def _answer(service: Service, asking: Awaitable[Asked]) -> dict[str, Any]:
    return await service.answer(await asking)


async def _events(first: dict[str, Any], chunks: AsyncGenerator[dict[str, Any], None]) -> AsyncIterator[str]:
    """Server-sent events. An error after the first one is an event as well, since the status is long sent."""
    async with aclosing(chunks):
        try:
            yield _event(first)
            async for chunk in chunks:
                yield _event(chunk)
        except Exception as error:
            yield _event(_told(error).body())
        yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(GONE, "the client closed the connection")
    finally:
        for pending in (task, gone):
            pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _told(error: BaseException) -> ApiError:
    known = as_api_error(error)
    if known.status == 500:
        log.error("a request failed", exc_info=error)
    return known


def _why(error: BaseException) -> str:
    """What keeps a body from being read."""
    if isinstance(error, UnicodeDecodeError):
        return "it is no UTF-8"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return "it holds a number too long" if isinstance(error, ValueError) else type(error).__name__


def _add_error_handlers(app: FastAPI) -> None:
    def reply(error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(ApiError)
    async def known(_: Request, error: ApiError) -> Response:
        return reply(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return reply(describe(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        cause = error.__cause__  # of a body that could not be read
        if isinstance(cause, ApiError):
            return reply(cause)
        if cause is not None and error.status_code == 400:
            return reply(ApiError(400, f"the body cannot be read: {_why(cause)}", code="invalid_json"))
        message = f"{request.method} {request.url.path}: {error.detail}"
        return reply(ApiError(error.status_code, message[:300]))

    @app.exception_handler(Exception)
    async def unknown(_: Request, error: Exception) -> Response:
        return reply(_told(error))


async def _discard(receive: Receive) -> None:
    """Read on and forget, within bounds."""
    size, more = 0, True
    while more and size < 8 * MAX_BODY:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)


class Gate:
    """What every request passes before it is read: host, key and size; and the counting of what became of it."""

    def __init__(self, app: ASGIApp, api_key: str | None, hosts: Sequence[str] | None, metrics: Any) -> None:
        self.app, self._key, self._hosts, self._metrics = app, api_key, hosts, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, size = 500, 0

        async def counted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def bounded_receive() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY:
                raise ApiError(413, f"the body is longer than {MAX_BODY} bytes", code="body_too_large")
            return message

        try:
            headers = Headers(scope=scope)
            self._check(scope["path"], headers)
            await self.app(scope, bounded_receive, counted_send)
        except ApiError as error:
            if error.status == 413:
                await _discard(receive)  # else the client sees a broken connection in place of the reason
            await JSONResponse(error.body(), error.status, error.headers)(scope, receive, counted_send)
        finally:
            route = getattr(scope.get("route"), "path", None) or "other"
            self._metrics.requests.labels(route, str(status)).inc()

    def _check(self, path: str, headers: Headers) -> None:
        if len(headers.getlist("host")) > 1:  # proxies and servers differ in which one counts
            raise ApiError(400, "the request has several Host headers")
        host = headers.get("host", "")
        name = host if host.endswith("]") else host.rsplit(":", 1)[0] if ":" in host else host
        if self._hosts is not None and name.lower() not in self._hosts:
            raise ApiError(403, f"this server is not known as {name[:100]!r}", code="unknown_host")
        if self._key is not None and path.startswith(("/v1", "/page/")):
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._key.encode()):
                raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length[:20]) > MAX_BODY:
            raise ApiError(413, f"the body is longer than {MAX_BODY} bytes", code="body_too_large")
