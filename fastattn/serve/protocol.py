"""uvicorn's HTTP protocol with limits for the head of a request, which arrives before the application sees anything."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

from fastattn.serve.errors import ApiError

HEAD_BYTES = 64 << 10  # most of a request's line and headers
HEAD_SECONDS = 30.0  # that they may take to arrive
# of httptools' protocol, overridden here
HOOKS = ("on_message_begin", "on_headers_complete", "send_400_response")


def limited_protocol() -> type[asyncio.Protocol]:
    """uvicorn's protocol with limits: httptools' where it is installed and has the methods needed, otherwise h11's.

    A connection on which no request runs is closed if the next head is not complete HEAD_SECONDS after the connection
    was made or the first bytes of the head came, with status 408 if any came. A head of more than HEAD_BYTES gets
    status 431; h11 has a limit of its own, with status 400.
    """
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        pass
    else:
        if all(hasattr(HttpToolsProtocol, name) for name in HOOKS):
            return _sized(_timed(HttpToolsProtocol))
    from uvicorn.protocols.http.h11_impl import H11Protocol

    return _timed(H11Protocol)


def _timed(base: Any) -> Any:
    class Timed(base):
        """Closes connections on which nothing runs and no request begins."""

        head_timer: asyncio.TimerHandle | None = None
        begun = False  # whether anything came

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.head_timer = self.loop.call_later(HEAD_SECONDS, self.late)

        def connection_lost(self, exc: Exception | None) -> None:
            self.stop_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            before, self.begun = self.cycle, True
            super().data_received(data)
            if self.cycle is not before:  # a head is complete
                self.stop_timer()
            elif self.idle and self.head_timer is None and not self.transport.is_closing():
                self.head_timer = self.loop.call_later(HEAD_SECONDS, self.late)

        @property
        def idle(self) -> bool:
            """Whether no request runs."""
            return self.cycle is None or self.cycle.response_complete

        def stop_timer(self) -> None:
            if self.head_timer is not None:
                self.head_timer.cancel()
                self.head_timer = None

        def late(self) -> None:
            self.head_timer = None
            if self.begun:
                message = f"the head of the request took longer than {HEAD_SECONDS:g} s"
                self.refuse(ApiError(408, message, code="head_too_slow"))
            else:
                self.transport.close()

        def refuse(self, error: ApiError) -> None:
            """Answer for the application and close; without an answer where another one is being sent."""
            if not self.transport.is_closing():
                if self.idle:
                    self.transport.write(_answer(error))
                self.transport.close()

    return Timed


def _sized(base: Any) -> Any:
    class Sized(base):
        """Refuses heads that are too large; what httptools collects of one has no limit."""

        in_head = False
        head_bytes = 0  # of those that came after the part in which the head began
        too_large = False

        def on_message_begin(self) -> None:
            self.in_head, self.head_bytes = True, 0
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self.in_head = False
            if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > HEAD_BYTES:
                self.too_large = True
                raise ValueError  # which the parser passes on as an error of its own
            super().on_headers_complete()

        def data_received(self, data: bytes) -> None:
            continued = self.in_head
            super().data_received(data)
            if self.in_head and continued:
                self.head_bytes += len(data)
                if self.head_bytes > HEAD_BYTES:
                    self.refuse_size()

        def send_400_response(self, msg: str) -> None:
            if self.too_large:
                self.refuse_size()
            else:
                super().send_400_response(msg)

        def refuse_size(self) -> None:
            message = f"the head of the request is larger than {HEAD_BYTES} bytes"
            self.refuse(ApiError(431, message, code="head_too_large"))

    return Sized


def _answer(error: ApiError) -> bytes:
    body = json.dumps(error.body).encode()
    head = (
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body
