"""The work of `fastattn serve`: load folders and answer until told to stop."""

from __future__ import annotations

import importlib.util
import logging
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from fastattn import console
from fastattn.console import InputError
from fastattn.serve.hosts import is_host, is_loopback
from fastattn.serve.options import ServeOptions

NEEDED = ("fastapi", "uvicorn", "prometheus_client")
ANSWER_SECONDS = 10  # that responses have to reach clients once all requests have ended
MODES = ("float32", "bfloat16", "float16")


def check_installed() -> None:
    """InputError where a package of the extra is missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"serving needs {', '.join(missing)}: pip install 'fastattn[serve]'")


def check_options(folders: Sequence[Path], options: ServeOptions) -> None:
    """Refuse what cannot be served, before anything is loaded."""
    import torch

    for folder in folders:
        console.check_folder(folder)
    if options.dtype is not None and options.dtype not in MODES:
        raise InputError(f"--dtype: got {options.dtype[:40]!r}, needs one of {', '.join(MODES)}")
    if options.device is not None:
        try:
            kind = torch.device(options.device).type
        except (RuntimeError, ValueError):
            kind = ""
        if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
            raise InputError(
                f"--device: got {options.device[:40]!r}, needs cpu, or cuda where there is a GPU"
            )
    key = options.api_key
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and key):
        raise InputError("--api-key: needs printable ASCII without spaces around it")
    for name in options.allowed_hosts or ():
        if not is_host(name):
            raise InputError(f"--allowed-host: got {name[:40]!r}, needs a name or an address, without a port")


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address, which nobody can connect to before the server listens; InputError if it cannot be had."""
    try:
        if not host:
            raise OSError("it is empty")
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        made = socket.socket(found[0][0], socket.SOCK_STREAM)
    except (OSError, UnicodeError, ValueError) as error:
        raise InputError(f"--host: got {host[:40]!r}, which is not an address ({error})") from None
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(found[0][4])
    except OSError as error:
        made.close()
        raise InputError(f"--host, --port: cannot listen on {host[:40]}:{port} ({error})") from None
    made.set_inheritable(True)
    return made


def with_hosts(options: ServeOptions, host: str, address: str) -> ServeOptions:
    """The options of a server at an address: one of loopback without a key answers its own names and origin alone."""
    if options.api_key is None and options.allowed_hosts is None and is_loopback(address):
        return replace(options, allowed_hosts=(host,))
    return options


def log_to_stderr() -> None:
    """Where the process has no logging of its own: messages from INFO up, with time and logger."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)


def serve(
    folders: Sequence[Path], host: str, port: int, options: ServeOptions, say: Callable[[str], None]
) -> None:
    """Serve until SIGTERM or SIGINT; then take nothing new and finish what runs, within options.drain seconds.

    Raises:
        InputError: a folder cannot be served, a package is missing, or the address cannot be used.
    """
    check_options(folders, options)
    listening = bound(host, port)
    check_installed()
    import uvicorn

    from fastattn.serve.app import create_app
    from fastattn.serve.protocol import limited_protocol
    from fastattn.serve.served import load_all

    log_to_stderr()
    options = with_hosts(options, host, listening.getsockname()[0])
    models = load_all(folders, options)
    app = create_app(models, options)

    class Server(uvicorn.Server):
        """Ends requests before connections: uvicorn itself would cancel the tasks of those that wait or run on."""

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            await app.state.stop(lambda: self.force_exit)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app,
        http=limited_protocol(),
        ws="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=ANSWER_SECONDS,
        server_header=False,
        lifespan="on",
    )
    shown = f"[{host}]" if listening.family == socket.AF_INET6 else host
    say(f"serving {', '.join(models)} on http://{shown}:{listening.getsockname()[1]}")
    # uvicorn raises the signal again once it has ended in good order, which is what a stop by SIGTERM is
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        Server(config).run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, before)
