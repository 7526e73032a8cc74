"""The settings of a server: sizes of the engine, and the limits that requests are held to."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class ServeOptions:
    """How models are served.

    Args:
        device: "cpu", "cuda" ...; None = a GPU where there is one.
        dtype: of the weights, as "bfloat16"; None = the checkpoint's.
        max_batch: most continuations of a model that run at the same time.
        max_queue: most requests of a model that wait; the next get 429.
        max_tokens: most tokens that a request may ask for; None = what fits after its prompt.
        max_length: most tokens of prompt and continuation; None = what the model reads.
        kv_memory: bytes for the keys and values of a model; None = for max_batch sequences, at most 1 GiB.
        page_size: tokens of a page of them; a CPU is fastest with a multiple of 64.
        batch_tokens: tokens of texts that an encoder reads at the same time; None = 2048 on a CPU, where
            temporaries of more tokens leave the caches, and 8192 elsewhere.
        max_body: most bytes of a request.
        max_inputs: most texts of a request, and most prompts times `n`.
        timeout: seconds after which a request fails.
        drain: seconds that running requests get to finish when the server is told to stop.
        api_key: what clients have to show as bearer; None = nothing.
        allowed_hosts: what the Host header may name besides localhost and the addresses of loopback; pages of other
            origins are then refused as well. None = any host and origin; `fastattn serve` itself, on an address of
            loopback and without a key, takes none but its own.
        log_prompts: whether the log holds the bodies of requests, with their prompts.
    """

    device: str | None = None
    dtype: str | None = None
    max_batch: int = 16
    max_queue: int = 256
    max_tokens: int | None = None
    max_length: int | None = None
    kv_memory: int | None = None
    page_size: int = 64
    batch_tokens: int | None = None
    max_body: int = 4 << 20
    max_inputs: int = 2048
    timeout: float = 600.0
    drain: float = 30.0
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] | None = None
    log_prompts: bool = False


def key_from_environment() -> str | None:
    """The API key in FASTATTN_API_KEY; None where there is none."""
    return os.environ.get("FASTATTN_API_KEY") or None
