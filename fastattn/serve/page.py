"""The page at `/`, and the attention weights that it draws."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from fastattn.data import DataError
from fastattn.serve.completions import check_text
from fastattn.serve.errors import ApiError, of_exception, of_failure
from fastattn.serve.http import unless_gone
from fastattn.serve.maps import attention_maps
from fastattn.serve.options import ServeOptions
from fastattn.serve.schemas import AttentionBody
from fastattn.serve.served import Decoder, Encoder

log = logging.getLogger("fastattn.serve")
FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
# The page holds what models say: nothing in it may run or be fetched but the page's own files.
POLICY = "default-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cache-control": "no-cache",
}


def routes() -> list[Route]:
    """The routes of the page's files, which are read once."""
    folder = Path(__file__).with_name("page_files")
    return [_route(path, (folder / name).read_bytes(), kind) for path, (name, kind) in FILES.items()]


def _route(path: str, content: bytes, kind: str) -> Route:
    async def endpoint(_: HttpRequest) -> Response:
        return Response(content, media_type=f"{kind}; charset=utf-8", headers=HEADERS)

    return Route(path, endpoint)


async def attention(
    http: HttpRequest, body: AttentionBody, model: Decoder | Encoder, _: ServeOptions
) -> dict[str, Any]:
    """The attention weights of a text, computed in the model's thread between two of its steps."""
    for name, text in (("text", body.text), ("text_pair", body.text_pair)):
        if text is not None:
            check_text(name, text)
    if isinstance(model, Decoder) and model.encodes:
        raise ApiError(
            400, f"model: {model.name} is an encoder-decoder, of which no maps are drawn", param="model"
        )
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[dict[str, Any]] = loop.create_future()

    def settle(set_: Callable[[Any], None], value: Any) -> None:
        if not answer.done():
            set_(value)

    def work() -> None:
        if answer.cancelled():
            return
        try:
            owner = model.engine if isinstance(model, Decoder) else model
            tokenizer = model.tokenizer if isinstance(model, Decoder) else model.worker.tokenizer
            found = attention_maps(owner.model, tokenizer, body.text, body.text_pair)
        except Exception as error:
            if not isinstance(error, DataError):
                log.error("a request failed", exc_info=error)
            loop.call_soon_threadsafe(settle, answer.set_exception, of_failure(error))
        else:
            loop.call_soon_threadsafe(settle, answer.set_result, found)

    def refuse(error: Exception) -> None:
        loop.call_soon_threadsafe(settle, answer.set_exception, of_exception(error))

    try:
        model.worker.call(work, refuse)
    except Exception as error:
        raise of_exception(error) from None
    found = await unless_gone(http, answer, lambda: None)
    return {"model": model.name, **(found or {})}
