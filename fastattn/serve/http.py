"""Parts of every endpoint: reading bodies, errors, streams, and what a client that leaves means."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastattn.serve.errors import ApiError, of_failure
from fastattn.serve.hosts import Hosts
from fastattn.serve.json_text import dumped
from fastattn.serve.metrics import Metrics
from fastattn.serve.options import ServeOptions
from fastattn.serve.schemas import UNKNOWN_NAME

log = logging.getLogger("fastattn.serve")
Parsed = TypeVar("Parsed", bound=BaseModel)
BODY_SECONDS = 60.0  # that a body may take to arrive
SEND_SECONDS = 60.0  # that a client may leave an event unread
# Of monitors and of the page's files, which show no key.
OPEN_PATHS = ("/health", "/ready", "/metrics", "/", "/page.css", "/page.js")


async def read_body(request: HttpRequest, kind: type[Parsed], limits: ServeOptions) -> Parsed:
    """The body of a request, in JSON: ApiError 415 of another type, 413 if it is larger than it may be, 400 if it does
    not fit."""
    # Pages of other origins may send the other types, and none, without being asked whether they are allowed to.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "Content-Type: needs application/json", code="unsupported_media_type")
    most = limits.max_body
    too_large = ApiError(413, f"the body is larger than {most} bytes", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length[:20]) > most:
        raise too_large
    parts: list[bytes] = []

    async def read() -> None:
        size = 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > most:
                raise too_large

    try:
        await asyncio.wait_for(read(), BODY_SECONDS)
    except (TimeoutError, asyncio.TimeoutError):
        raise ApiError(408, f"the body took longer than {BODY_SECONDS:.0f} s", code="body_too_slow") from None
    except ClientDisconnect:
        raise ApiError(499, "the client is gone") from None
    try:
        body = kind.model_validate_json(b"".join(parts))
    except ValidationError as error:
        raise _refusal(error) from None
    if limits.log_prompts:  # as JSON in ASCII: no text begins a line of its own
        log.info("%s %s", request.url.path, json.dumps(body.model_dump(exclude_unset=True)))
    return body


def _refusal(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a body; what the client sent is not repeated."""
    errors = error.errors(include_url=False, include_input=False)
    # of a value of several kinds the one that it was meant to be
    first = next((each for each in errors if each["type"] == UNKNOWN_NAME), errors[0])
    places = [str(part) for part in first["loc"] if isinstance(part, (int, str))]
    if first["type"] == UNKNOWN_NAME:
        places.append(first["ctx"]["name"])
    param = places[0] if places else None
    reason = first["msg"]
    where = ".".join(places[:1] + [p for p in places[1:] if p.isdigit() or p.isidentifier()])
    return ApiError(400, f"{where or 'body'}: {reason}"[:500], param=param)


def error_response(error: ApiError) -> JSONResponse:
    """The response of an error."""
    return JSONResponse(error.body, error.status, headers=error.headers)


def new_id(prefix: str) -> str:
    """An id for a response."""
    return f"{prefix}-{uuid.uuid4().hex}"


async def until_disconnect(receive: Receive) -> None:
    """Returns when the client is gone; the body was read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: HttpRequest, work: Any, cancel: Callable[[], None]) -> Any:
    """The result of an awaitable; `cancel` is called, and None returned, if the client leaves before."""
    leaving = asyncio.ensure_future(until_disconnect(request.receive))
    working = asyncio.ensure_future(work)
    try:
        await asyncio.wait({leaving, working}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        return None
    finally:
        if not working.done():
            cancel()
            working.cancel()
        leaving.cancel()


class EventStream:
    """A response of server-sent events, the last of which is [DONE]; stops when the client leaves or does not read.

    Args:
        events: the objects of the events, or their text in JSON. An exception becomes an event with its error.
        cancel: called once nothing more is wanted.
    """

    def __init__(self, events: AsyncIterator[dict[str, Any] | str], cancel: Callable[[], None]) -> None:
        self.events, self.cancel = events, cancel
        self._since: float | None = None  # when the event that is being sent began

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        leaving = asyncio.ensure_future(until_disconnect(receive))
        sending = asyncio.ensure_future(self._send_all(send))
        watching = asyncio.ensure_future(self._unread())
        try:
            tasks = {leaving, sending, watching}
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                log.info("a stream ended early: the client left an event unread for %g s", SEND_SECONDS)
            elif sending.done() and not sending.cancelled() and (error := sending.exception()) is not None:
                log.info("a stream ended early: %s", type(error).__name__)
        finally:
            self.cancel()
            for task in (leaving, sending, watching):
                task.cancel()

    async def _unread(self) -> None:
        """Returns when the client has left an event unread for too long. One timer for all events of a stream: one for
        each would take longer than sending it."""
        while self._since is None or (left := self._since + SEND_SECONDS - time.monotonic()) > 0:
            await asyncio.sleep(SEND_SECONDS if self._since is None else left)

    async def _send_all(self, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]

        async def pass_on(message: Message) -> None:
            self._since = time.monotonic()
            await send(message)
            self._since = None

        async def write(data: str, last: bool = False) -> None:
            body = f"data: {data}\n\n".encode()
            await pass_on({"type": "http.response.body", "body": body, "more_body": not last})

        await pass_on({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for event in self.events:
                await write(event if isinstance(event, str) else dumped(event))
        except OSError:
            raise
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("a stream failed")
            await write(json.dumps(of_failure(error).body))
        await write("[DONE]", last=True)


class Guard:
    """In front of every endpoint: hosts and the key, an id for each request, counts, and errors as OpenAI's."""

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None,
        allowed_hosts: Collection[str] | None,
        metrics: Metrics,
        paths: Collection[str],
    ) -> None:
        self.app, self.metrics, self.paths = app, metrics, paths
        self.key = None if api_key is None else api_key.encode()
        self.hosts = None if allowed_hosts is None else Hosts(allowed_hosts, OPEN_PATHS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 0
        # of the application, wherever it is mounted
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        marked = given if given.isascii() and 0 < len(given) <= 128 else uuid.uuid4().hex.encode()

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), (b"x-request-id", marked)]}
            await send(message)

        try:
            refusal = self._refusal(scope["method"], path, headers)
            answer = self.app if refusal is None else error_response(refusal)
            await answer(scope, receive, counted)
        except Exception as error:
            log.exception("a request failed")
            if not status:
                await error_response(of_failure(error))(scope, receive, counted)
        finally:
            route = path if path in self.paths else "other"
            self.metrics.answered(route, status, time.monotonic() - started)

    def _refusal(self, method: str, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        refusal = None if self.hosts is None else self.hosts.refusal(method, path, headers)
        if refusal is None and self.key is not None and path not in OPEN_PATHS and not self._knows(headers):
            return ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        return refusal

    def _knows(self, headers: dict[bytes, bytes]) -> bool:
        kind, _, token = headers.get(b"authorization", b"").partition(b" ")
        assert self.key is not None
        return hmac.compare_digest(token.strip(), self.key) and kind.lower() == b"bearer"
