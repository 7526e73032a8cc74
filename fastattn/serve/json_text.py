"""JSON of answers that may be large, made beside the event loop.

json.dumps keeps Python's lock until it is done, so that a thread alone would not let the loop run meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

T = TypeVar("T")
PART = 1024  # most entries that one call writes
SMALL = 8192  # entries up to which an answer is made in the event loop: a few milliseconds, as a thread's turn may cost


async def json_response(value: Any) -> Response:
    """The response of an answer, whose text is made in a thread where it is large."""
    text = await beside_loop(_entries(value), lambda: written(value))
    return Response(text, media_type="application/json")


async def beside_loop(entries: int, work: Callable[[], T]) -> T:
    """What `work` returns, called in a thread where it handles many entries."""
    return work() if entries <= SMALL else await run_in_threadpool(work)


def _entries(value: Any) -> int:
    """The number of values in an answer; it is not counted far beyond SMALL."""
    if not isinstance(value, (dict, list)):
        return 1
    inner = value.values() if isinstance(value, dict) else value
    if not _nested(inner):
        return len(value)
    count = 0
    for each in inner:
        count += _entries(each)
        if count > SMALL:
            break
    return count


def written(value: Any) -> str:
    """The text of a value, by many calls of json.dumps; ValueError of numbers that are not finite."""
    return "".join(pieces(value))


def dumped(value: Any) -> str:
    """The text of a small value; ValueError of numbers that are not finite."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def pieces(value: Any) -> Iterator[str]:
    """The text of a value in parts, none of which has more than PART entries."""
    if isinstance(value, dict) and (_nested(value.values()) or len(value) > PART):
        for number, (name, each) in enumerate(value.items()):
            yield f"{',' if number else '{'}{dumped(name)}:"
            yield from pieces(each)
        yield "}"
    elif isinstance(value, list) and _nested(value):
        for number, each in enumerate(value):
            yield "," if number else "["
            yield from pieces(each)
        yield "]"
    elif isinstance(value, list) and len(value) > PART:
        for start in range(0, len(value), PART):
            yield "," if start else "["
            yield dumped(value[start : start + PART])[1:-1]
        yield "]"
    else:
        yield dumped(value)


def _nested(values: Any) -> bool:
    return any(isinstance(each, (dict, list)) for each in values)
