"""Requests of clients that misbehave: cancels, broken and oversized bodies, slow readers, dropped connections."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from typing import Any

from measure.http_client import get, metric, post

WORDS = ("river", "tower", "the", "old", "sea", "runs", "in", "town", "a", "to")
KINDS = (
    "healthy",
    "healthy",
    "cancelled",
    "cancelled-whole",
    "malformed",
    "oversized",
    "slow reader",
    "dropped",
)


async def faults(port: int, count: int, clients: int = 16, seed: int = 0) -> dict[str, Any]:
    """Send requests of every kind at random; what was answered, and what was wrong."""
    draw = random.Random(seed)
    bodies = []
    for number in range(8):
        prompt = " ".join(draw.choices(WORDS, k=draw.randint(1, 30)))
        body = {
            "prompt": prompt,
            "max_tokens": draw.randint(1, 40),
            "temperature": number % 2,
            "seed": number,
        }
        bodies.append({**body, "stream": number % 4 < 2})
    expected = [(await post(port, body)).text for body in bodies]  # alone
    statuses: Counter[str] = Counter()
    wrong: list[str] = []
    gate = asyncio.Semaphore(clients)

    async def one(number: int, kind: str) -> None:
        which = number % len(bodies)
        body: Any = dict(bodies[which])
        more: dict[str, Any] = {}
        if kind == "cancelled":
            body |= {"stream": True, "max_tokens": 150}
            more["leave_after"] = number % 3
        elif kind == "cancelled-whole":  # no stream: it leaves before there is an answer
            body |= {"stream": False, "max_tokens": 150}
            more["leave_in"] = number % 3 * 0.02
        elif kind == "malformed":
            data = json.dumps(body).encode()
            body = (data[:-9], b"\x00\xff" + data, b'{"prompt": 1}', b"[" * 5000, b"")[number % 5]
        elif kind == "oversized":
            body["prompt"] = "the old river " * 4000
        elif kind == "slow reader":
            body |= {"stream": True, "max_tokens": 40}
            more["pause"] = 0.01
        elif kind == "dropped":
            more["cut"] = number % 200 + 10
        async with gate:
            try:
                answer = await post(port, body, **more)
            except Exception as error:
                wrong.append(f"{kind}: {error!r}")
                return
        statuses[f"{kind} {answer.status}"] += 1
        needed = {"malformed": 400, "oversized": 400, "dropped": 0, "cancelled-whole": 0}.get(kind, 200)
        if answer.status != needed:
            wrong.append(f"{kind}: status {answer.status}")
        elif kind == "healthy" and answer.text != expected[which]:
            wrong.append(f"healthy: {answer.text!r} for {expected[which]!r}")

    await asyncio.gather(*(one(number, draw.choice(KINDS)) for number in range(count)))
    end = time.monotonic() + 30.0
    while (held := await metric(port, "pages_held")) and time.monotonic() < end:
        await asyncio.sleep(0.05)
    if held:
        wrong.append(f"{held:.0f} pages are held by nobody")
    if (await get(port, "/health")).status != 200:
        wrong.append("it is not healthy any more")
    return {"requests": count, "answers": dict(sorted(statuses.items())), "wrong": wrong}
