"""A client of a server under measurement: it may leave, read slowly or cut a request, and knows when bytes arrived."""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

HOST = "127.0.0.1"
READ = 1 << 16
PATIENCE = 120.0


@dataclass
class Answer:
    """What came of a request: its status and body, and when each piece of the body arrived."""

    status: int = 0
    body: bytes = b""
    times: list[float] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text of a completion, streamed or not."""
        if not self.body.lstrip().startswith(b"data:"):
            return str(json.loads(self.body)["choices"][0]["text"])
        lines = re.findall(rb"^data: (\{.*)$", self.body, re.M)
        return "".join(choice["text"] for line in lines for choice in json.loads(line)["choices"])


async def get(port: int, path: str) -> Answer:
    """A GET."""
    return await send(port, f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode())


async def post(port: int, body: Any, path: str = "/v1/completions", **more: Any) -> Answer:
    """A POST; `body` is bytes, or made JSON of."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    return await send(port, head.encode() + data, **more)


async def send(
    port: int,
    message: bytes,
    *,
    leave_after: int | None = None,
    leave_in: float | None = None,
    pause: float = 0.0,
    cut: int | None = None,
) -> Answer:
    """Send a request and read the answer.

    Args:
        leave_after: pieces of the answer after which the connection is closed.
        leave_in: seconds after which it is closed without an answer being read.
        pause: seconds between reads.
        cut: bytes of the request after which the connection is closed.
    """
    reader, writer = await asyncio.open_connection(HOST, port, limit=1 << 12 if pause else 1 << 16)
    answer = Answer()
    try:
        writer.write(message[:cut])
        await writer.drain()
        if leave_in is not None:
            await asyncio.sleep(leave_in)
        if cut is not None or leave_in is not None:
            return answer
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)
        answer.status = int(head.split()[1])
        raw = b""
        while leave_after is None or len(answer.times) < leave_after:
            part = await asyncio.wait_for(reader.read(512 if pause else READ), PATIENCE)
            if not part:
                break
            raw += part
            answer.times.append(time.perf_counter())
            if pause:
                await asyncio.sleep(pause)
        answer.body = _unchunked(raw) if b"chunked" in head.lower() else raw
        return answer
    finally:
        writer.close()


def _unchunked(raw: bytes) -> bytes:
    body = b""
    while raw:
        size, _, rest = raw.partition(b"\r\n")
        count = int(size or b"0", 16)
        body += rest[:count]
        raw = rest[count + 2 :]
        if not count:
            break
    return body


async def metric(port: int, name: str) -> float:
    """A gauge or a counter of /metrics."""
    text = (await get(port, "/metrics")).body.decode()
    found = re.search(rf"^fastattn_{name}\{{.*\}} (\S+)$", text, re.M)
    assert found, name
    return float(found[1])


def gaps(answer: Answer) -> list[tuple[float, float]]:
    """(when, seconds since the one before) of each piece of an answer but the first."""
    return [(later, later - earlier) for earlier, later in zip(answer.times, answer.times[1:])]


def p95(seconds: Sequence[float]) -> float:
    """The 95th percentile; ValueError of fewer than two."""
    if len(seconds) < 2:
        raise ValueError(f"seconds: got {len(seconds)} of them, needs 2 or more")
    return statistics.quantiles(seconds, n=20, method="inclusive")[-1]
