"""The HTTP application over loaded models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from fastattn.serve import completions, page, pooling
from fastattn.serve import schemas as bodies
from fastattn.serve.errors import ApiError
from fastattn.serve.http import Guard, error_response, read_body
from fastattn.serve.json_text import json_response
from fastattn.serve.metrics import Metrics
from fastattn.serve.options import ServeOptions
from fastattn.serve.served import Decoder, Encoder

Served = TypeVar("Served", Decoder, Encoder)
Parsed = TypeVar("Parsed", bound=BaseModel)


def create_app(models: Mapping[str, Decoder | Encoder], options: ServeOptions | None = None) -> FastAPI:
    """The application that serves models by their names; their threads start and end with it.

    Args:
        models: name -> model, as `fastattn.serve.served.load_all` makes them of folders.
        options: the limits of requests; None for the defaults.

    Returns:
        An ASGI application, for uvicorn or another server. Its `state.stop(hurry)` answers what waits with status 503,
        lets what runs finish within `drain` seconds, or until `hurry` returns True, and then ends the threads. A server
        awaits it before it closes connections; the lifespan does at its end.
    """
    limits = options or ServeOptions()
    metrics = Metrics(models)
    state = {"closing": False}
    paths: set[str] = set()  # that metrics tell apart

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for model in models.values():
            model.worker.start()
        try:
            yield
        finally:
            await stop()

    async def stop(hurry: Callable[[], bool] = lambda: False) -> None:
        state["closing"] = True
        for model in models.values():
            model.worker.close()
        end = time.monotonic() + limits.drain
        while any(m.worker.unfinished for m in models.values()) and time.monotonic() < end and not hurry():
            await asyncio.sleep(0.02)
        for model in models.values():
            await run_in_threadpool(model.worker.stop)

    app = FastAPI(title="fastattn", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.models, app.state.stop = models, stop
    app.add_middleware(
        Guard, api_key=limits.api_key, allowed_hosts=limits.allowed_hosts, metrics=metrics, paths=paths
    )

    @app.exception_handler(ApiError)
    async def _refused(_: HttpRequest, error: ApiError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def _no_route(_: HttpRequest, error: HTTPException) -> JSONResponse:
        response = error_response(ApiError(error.status_code, str(error.detail)))
        response.headers.update(error.headers or {})  # as Allow, of a method that a path has not
        return response

    def chosen(name: str | None, kind: type[Served]) -> Served:
        if name is None:
            able = [model for model in models.values() if isinstance(model, kind)]
            if len(able) != 1:
                raise ApiError(400, "model: is missing, and not one model alone can answer", param="model")
            return able[0]
        model = models.get(name)
        if model is None:
            shown = name[:100]
            raise ApiError(404, f"The model {shown!r} does not exist", param="model", code="model_not_found")
        if not isinstance(model, kind):
            needed = "generates text" if kind is Decoder else "is an encoder"
            raise ApiError(400, f"model: {name} is none that {needed}", param="model")
        return model

    def post(path: str, body: type[Parsed], kind: Any, work: Callable[..., Awaitable[Any]]) -> None:
        async def endpoint(http: HttpRequest) -> Any:
            parsed: Any = await read_body(http, body, limits)
            result = await work(http, parsed, chosen(parsed.model, kind), limits)
            return await json_response(result) if isinstance(result, dict) else result

        app.router.add_route(path, endpoint, methods=["POST"])

    async def _completions(http: HttpRequest, body: Any, model: Decoder, _: ServeOptions) -> Any:
        return await completions.completions(http, body, model, limits, metrics)

    async def _chat(http: HttpRequest, body: Any, model: Decoder, _: ServeOptions) -> Any:
        return await completions.chat(http, body, model, limits, metrics)

    post("/v1/completions", bodies.CompletionBody, Decoder, _completions)
    post("/v1/chat/completions", bodies.ChatBody, Decoder, _chat)
    post("/v1/embeddings", bodies.EmbeddingBody, Encoder, pooling.embeddings)
    for path in ("/rerank", "/v1/rerank"):
        post(path, bodies.RerankBody, Encoder, pooling.rerank)
    post("/classify", bodies.ClassifyBody, Encoder, pooling.classification)
    post("/predict", bodies.PredictBody, Encoder, pooling.prediction)
    post("/attention", bodies.AttentionBody, (Decoder, Encoder), page.attention)
    app.router.routes.extend(page.routes())

    @app.post("/tokenize")
    async def _tokenize(http: HttpRequest) -> Response:
        body = await read_body(http, bodies.TokenizeBody, limits)
        if body.model is None and len(models) == 1:
            model = next(iter(models.values()))
        else:
            model = chosen(body.model, (Decoder, Encoder))  # type: ignore[arg-type]
        return await json_response(await run_in_threadpool(pooling.tokenize, body, model))

    @app.get("/v1/models")
    async def _models() -> dict[str, Any]:
        return {"object": "list", "data": [model.card for model in models.values()]}

    @app.get("/v1/models/{name}")
    async def _model(name: str) -> Response:
        if name not in models:
            raise ApiError(
                404, f"The model {name[:100]!r} does not exist", param="model", code="model_not_found"
            )
        return JSONResponse(models[name].card)

    def alive() -> bool:
        return all(model.worker.alive for model in models.values())

    @app.get("/health")
    async def _health() -> Response:
        good = alive() or state["closing"]
        return JSONResponse({"status": "ok" if good else "failed"}, 200 if good else 503)

    @app.get("/ready")
    async def _ready() -> Response:
        good = alive() and not state["closing"]
        return JSONResponse({"status": "ready" if good else "not ready"}, 200 if good else 503)

    @app.get("/metrics")
    async def _metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    paths.update(getattr(route, "path", "") for route in app.routes)
    return app
