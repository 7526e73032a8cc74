"""`fastattn serve`: models behind an HTTP API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastattn.collector import paused
from fastattn.constants import MAX_INT32

MEGABYTE = 1 << 20


def serve(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Models' folders with tokenizers.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; only this machine by default.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; a GPU by default where there is one.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default the folder's.")
    ] = None,
    max_batch: Annotated[
        int, typer.Option(min=1, max=4096, help="Continuations of each model that run at the same time.")
    ] = 16,
    max_queue: Annotated[
        int, typer.Option(min=1, max=2**20, help="Requests of each model that wait; the next get status 429.")
    ] = 256,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, max=MAX_INT32, help="Most tokens that a request may ask for.")
    ] = None,
    kv_memory: Annotated[
        int | None, typer.Option(min=1, max=2**24, help="MiB for keys and values of each model.")
    ] = None,
    page_size: Annotated[
        int,
        typer.Option(
            min=1, max=4096, help="Tokens of a page of these; a CPU is fastest with a multiple of 64."
        ),
    ] = 64,
    api_key: Annotated[
        str | None, typer.Option(help="What clients have to send; FASTATTN_API_KEY by default.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="A name that clients reach the server by, besides localhost; may be repeated."),
    ] = None,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write what clients send, prompts and texts, to the log.")
    ] = False,
) -> None:
    """Serve models with OpenAI's API: completions, chat and embeddings, and vLLM's rerank, classify and tokenize.

    Clients name a model by its folder's name. On a CPU each request gets the same tokens as alone. SIGTERM or Ctrl-C
    ends it: running requests get 30 seconds to finish, then they fail. Exits with 2 on bad input.
    """
    with paused():
        from fastattn.serve.options import ServeOptions, key_from_environment
        from fastattn.serve.server import serve as work

    options = ServeOptions(
        device=device,
        dtype=dtype,
        max_batch=max_batch,
        max_queue=max_queue,
        max_tokens=max_tokens,
        kv_memory=None if kv_memory is None else kv_memory * MEGABYTE,
        page_size=page_size,
        api_key=key_from_environment() if api_key is None else api_key,
        allowed_hosts=tuple(allowed_host) if allowed_host else None,
        log_prompts=log_prompts,
    )
    work(folders, host, port, options, typer.echo)
