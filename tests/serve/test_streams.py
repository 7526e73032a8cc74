"""How outputs reach an event loop, and what ends a stream."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from fastattn.serve import http
from fastattn.serve.generating import Mailbox, mailbox


async def endless() -> AsyncIterator[dict[str, Any]]:
    while True:
        yield {"text": "more"}


async def never() -> dict[str, Any]:
    await asyncio.Event().wait()
    return {}


def test_a_client_that_leaves_an_event_unread_ends_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "SEND_SECONDS", 0.05)
    cancelled: list[bool] = []
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) > 3:  # its buffer is full
            await asyncio.Event().wait()

    async def run() -> None:
        stream = http.EventStream(endless(), lambda: cancelled.append(True))
        await asyncio.wait_for(stream({}, never, send), 10.0)

    asyncio.run(run())
    assert cancelled
    assert len(sent) == 4


def test_a_stream_without_events_for_longer_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "SEND_SECONDS", 0.05)
    sent: list[Any] = []

    async def events() -> AsyncIterator[dict[str, Any]]:
        await asyncio.sleep(0.3)
        yield {"text": "late"}

    async def send(message: Any) -> None:
        sent.append(message.get("body"))

    asyncio.run(http.EventStream(events(), lambda: None)({}, never, send))
    assert sent == [None, b'data: {"text":"late"}\n\n', b"data: [DONE]\n\n"]


def test_a_mailbox_keeps_the_order_of_each_thread_and_loses_nothing() -> None:
    async def run() -> list[tuple[int, int]]:
        box, queue = mailbox(), asyncio.Queue[tuple[int, int]]()
        assert mailbox() is box

        def post(number: int) -> None:
            for i in range(500):
                box.post(queue, (number, i))

        threads = [threading.Thread(target=post, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        found = [await asyncio.wait_for(queue.get(), 10.0) for _ in range(2000)]
        for thread in threads:
            thread.join()
        return found

    found = asyncio.run(run())
    for number in range(4):
        assert [i for who, i in found if who == number] == list(range(500))


def test_a_mailbox_keeps_no_loop() -> None:
    async def made() -> weakref.ref[asyncio.AbstractEventLoop]:
        mailbox()
        return weakref.ref(asyncio.get_running_loop())

    loop = asyncio.run(made())
    gc.collect()
    assert loop() is None


def test_a_mailbox_of_a_closed_loop_says_so_each_time() -> None:
    loop = asyncio.new_event_loop()
    box = Mailbox(loop)
    loop.close()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            box.post(asyncio.Queue(), None)
