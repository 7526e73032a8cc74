"""Requests to a Ray Serve cluster, what their clients saw, and the processes of the cluster."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Answer:
    """A request and what its client saw of the answer."""

    body: dict[str, Any]
    text: str = ""
    finish: str | None = None
    error: Exception | None = None
    begun: threading.Event = field(default_factory=threading.Event)  # a token has arrived

    def ask(self, client: Any) -> None:
        try:
            made = client.completions.create(**self.body)
            for event in made if self.body["stream"] else [made]:
                self.text += event.choices[0].text
                self.finish = event.choices[0].finish_reason or self.finish
                self.begun.set()
        except Exception as error:
            self.error = error


@dataclass
class Cluster:
    process: subprocess.Popen[bytes]
    root: Path
    port: int
    environment: dict[str, str]

    def client(self, **options: Any) -> Any:
        import openai

        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="x", timeout=200, **options)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=200) as response:
            return response.read().decode()

    def replicas(self) -> set[int]:
        """The processes of this cluster's replicas."""
        return {pid for pid in descendants(self.process.pid) if "ServeReplica" in _title(pid)}

    def start(self, answers: list[Answer], **options: Any) -> list[threading.Thread]:
        client = self.client(**options)
        threads = [threading.Thread(target=answer.ask, args=(client,), daemon=True) for answer in answers]
        for thread in threads:
            thread.start()
        return threads


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def descendants(ancestor: int) -> set[int]:
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(") ")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
    found, size = {ancestor}, 0
    while len(found) > size:
        size = len(found)
        found |= {pid for pid, parent in parents.items() if parent in found}
    return found


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


def until(true: Callable[[], object], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.05)


def requests(count: int, max_tokens: int, stream: bool | None = None) -> list[Answer]:
    """Requests that differ in their seeds; every third is greedy, every other one a stream unless `stream` says."""
    return [
        Answer(
            {
                "model": "gpt2",
                "prompt": ("the river", "a tower in the old", "who")[index % 3],
                "max_tokens": max_tokens,
                "temperature": 0.0 if index % 3 == 2 else 1.0,
                "seed": index,
                "stream": index % 2 == 0 if stream is None else stream,
                "extra_body": {"ignore_eos": True},
            }
        )
        for index in range(count)
    ]


def environment(root: Path) -> dict[str, str]:
    """Variables for a cluster of its own, whose files lie in a folder with a short path: it holds sockets."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "RAY_TMPDIR": str(root),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": os.urandom(16).hex(),
        "OMP_NUM_THREADS": "1",
    }
