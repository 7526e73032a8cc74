"""The application of `fastattn serve` as a Ray Serve deployment: replicas of it, on one machine or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastattn.console import InputError
from fastattn.serve.engine.worker import JOIN_SECONDS
from fastattn.serve.errors import RETRY_AFTER
from fastattn.serve.options import ServeOptions, key_from_environment

NAME = "fastattn"  # of the deployment
HEALTH_PERIOD = 2.0  # seconds between health checks, and so before a replica that died is replaced
SHUTDOWN_SPARE = JOIN_SECONDS + 5.0  # for a replica to end after running requests had their time


class WithoutRequestId:
    """The application without the response header that Ray's proxies add themselves, with the same value."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def passed(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [pair for pair in message.get("headers", []) if pair[0].lower() != b"x-request-id"]
                message = {**message, "headers": kept}
            await send(message)

        await self.app(scope, receive, passed)


class Replica:
    """The models of some folders in a process of Ray's, and the application over them."""

    def __init__(self, folders: Sequence[Path], options: ServeOptions) -> None:
        from fastattn.serve.served import load_all
        from fastattn.serve.server import check_installed, check_options, log_to_stderr

        log_to_stderr()
        check_installed()
        check_options(folders, options)
        self.models, self.options = load_all(folders, options), options

    def __serve_build_asgi_app__(self) -> Any:
        """What Ray Serve sends requests to; it starts and ends the models' threads."""
        from fastattn.serve.app import create_app

        app = create_app(self.models, self.options)
        app.add_middleware(WithoutRequestId)
        return app

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica where this raises: the thread of a model has ended."""
        ended = [name for name, model in self.models.items() if not model.worker.alive]
        if ended:
            raise RuntimeError(f"{', '.join(ended)}: the thread that owns the model has ended")


def application(
    folders: Sequence[str | Path],
    options: ServeOptions | None = None,
    *,
    replicas: int = 1,
    cpus: float = 1,
    gpus: float = 0,
) -> Any:
    """The Ray Serve application of some folders, for `ray.serve.run`.

    A replica takes at most `options.max_batch` requests. The others wait in Ray's proxies, where the end of a replica
    does not reach them; when `options.max_queue` wait in a proxy, the next get status 429 with Retry-After.

    Args:
        folders: of the models, where the replicas find them: on every machine that may hold one.
        options: of each replica; None = the defaults.
        replicas: processes, each with its own copy of the models.
        cpus: of each replica. Ray starts a replica where so many are free, and torch computes with as many threads.
        gpus: of each replica, which sees no others.

    Raises:
        InputError: Ray Serve is not installed, or there is no folder.
        ValueError: Ray Serve refuses a number.
    """
    try:
        from ray import serve
        from ray.serve.config import BackpressureConfig
    except ImportError as error:
        raise InputError(f"Ray Serve is needed ({error}): pip install 'fastattn[ray]'") from None
    if not folders:
        raise InputError("folders: got none, needs one or more")
    limits = options or ServeOptions()
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=NAME,
        num_replicas=replicas,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        max_ongoing_requests=limits.max_batch,
        max_queued_requests=limits.max_queue,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=float(RETRY_AFTER)),
        health_check_period_s=HEALTH_PERIOD,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=limits.drain + SHUTDOWN_SPARE,
        max_constructor_retry_count=3,
    )
    return deployment.bind([Path(folder) for folder in folders], limits)


def build(args: Mapping[str, Any]) -> Any:
    """The application that a configuration file of Ray Serve describes, with the import path of this function.

    Args:
        args: `folders`, and as needed `replicas`, `cpus`, `gpus` and the fields of
            [ServeOptions][fastattn.serve.options.ServeOptions]. Without `api_key` it is FASTATTN_API_KEY of the
            process that calls this.

    Raises:
        InputError: a name is unknown, or a value does not fit.
    """
    own = {"folders": list[Path], "replicas": int, "cpus": float, "gpus": float}
    known = (*own, *(each.name for each in fields(ServeOptions)))
    unknown = [name for name in args if name not in known]
    if unknown:
        raise InputError(f"{unknown[0]}: is unknown, needs one of {', '.join(known)}")
    given = {"api_key": key_from_environment(), "folders": [], **args}
    if isinstance(given["folders"], str):  # `serve run ...:build folders=DIR` passes texts
        given["folders"] = [given["folders"]]
    values = {name: _value(name, kind, given.pop(name)) for name, kind in own.items() if name in given}
    return application(options=_value("options", ServeOptions, given), **values)


def _value(name: str, kind: Any, given: Any) -> Any:
    try:
        return TypeAdapter(kind).validate_python(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or name
        raise InputError(f"{where}: {first['msg']}") from None
