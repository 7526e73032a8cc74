"""Heads of requests that are too large or too slow end before the application sees them."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("uvicorn")

import uvicorn

from fastattn.serve import protocol

GET = b"GET / HTTP/1.1\r\nHost: a\r\n"
KINDS = ("httptools", "h11")


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers after the body, as the endpoints do."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture(params=KINDS)
def connect(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], socket.socket]]:
    """Makes connections to a server with each of uvicorn's protocols."""
    pytest.importorskip(request.param)
    if request.param == "h11":
        monkeypatch.setattr(protocol, "HOOKS", ("no_such_method",))
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 1.0)
    config = uvicorn.Config(app, http=protocol.limited_protocol(), ws="none", lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        with contextlib.ExitStack() as stack:
            yield lambda: stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60.0))
            server.should_exit = server.force_exit = True
        thread.join(60.0)


def rest_of(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    received = b""
    while part := connection.recv(1 << 16):
        received += part
    return received


def test_a_head_that_does_not_end_is_refused(connect: Callable[[], socket.socket]) -> None:
    assert rest_of(connect()) == b""
    one = connect()
    one.sendall(GET)
    assert rest_of(one).startswith(b"HTTP/1.1 408 ")


def test_a_connection_that_was_used_ends_as_well(connect: Callable[[], socket.socket]) -> None:
    one = connect()
    one.sendall(GET + b"\r\n")
    assert one.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
    one.sendall(b"GET / ")
    assert b"HTTP/1.1 408 " in rest_of(one)


def test_a_body_may_take_longer_than_a_head(connect: Callable[[], socket.socket]) -> None:
    one = connect()
    one.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nab")
    time.sleep(1.5)
    one.sendall(b"cd")
    assert one.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("line", [b"x: " + b"b" * 1000 + b"\r\n", b"b" * 1000], ids=["many", "one"])
def test_a_large_head_is_refused_before_it_ends(connect: Callable[[], socket.socket], line: bytes) -> None:
    one = connect()
    one.sendall(GET + b"x: ")
    with contextlib.suppress(ConnectionError):  # what is not read any more may cost the answer
        for _ in range((1 << 20) // len(line)):
            one.sendall(line)
        assert rest_of(one).split(b" ")[1] in (b"431", b"400")


@pytest.mark.parametrize("connect", ["httptools"], indirect=True)
def test_a_large_head_that_is_complete_is_refused(connect: Callable[[], socket.socket]) -> None:
    one = connect()
    one.sendall(GET + b"x: " + b"b" * (protocol.HEAD_BYTES + 1) + b"\r\n\r\n")
    answer = rest_of(one)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert b'"code": "head_too_large"' in answer


def test_a_head_below_the_limit_is_answered(connect: Callable[[], socket.socket]) -> None:
    one = connect()
    for _ in range(2):  # what one request took does not count for the next
        one.sendall(GET + b"x: " + b"b" * (10 << 10) + b"\r\n\r\n")
        assert one.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
