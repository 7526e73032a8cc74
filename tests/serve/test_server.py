"""`fastattn serve` as a process: the page's examples, a client that goes away, and SIGTERM."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import serve_cases
from pages import DOCS, blocks_of

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package)
PAGE = (DOCS / "serve.md").read_text(encoding="utf-8")


@dataclass
class Server:
    process: subprocess.Popen[str]
    port: int

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as response:
            return response.read().decode()

    def metric(self, name: str) -> float:
        found = re.search(rf'^fastattn_{name}{{model="gpt2"}} (\S+)$', self.get("/metrics"), re.M)
        assert found
        return float(found[1])

    def ask(self, max_tokens: int, stream: bool = True) -> socket.socket:
        """A connection whose request runs; of a stream the first tokens have arrived."""
        connection = self.send(max_tokens, stream)
        received = b""
        while stream and b"data: " not in received:
            received += connection.recv(4096)
        while not stream and not self.metric("running"):
            time.sleep(0.01)
        return connection

    def send(self, max_tokens: int, stream: bool = False) -> socket.socket:
        """A connection with a request."""
        body = {
            "model": "gpt2",
            "prompt": "the river",
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": stream,
        }
        data = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(head.encode() + data)
        return connection


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("serve")
    serve_cases.save_gpt(root / "gpt2", n_positions=4096)
    serve_cases.save_encoder(root / "minilm", "Model")
    serve_cases.save_gpt(root / "smollm2", chat=True)
    with started(["-m", "fastattn", "serve", "gpt2", "minilm", "smollm2", "--port=0"], root) as made:
        yield made


@contextlib.contextmanager
def started(words: list[str], root: Path, errors: Any = None) -> Iterator[Server]:
    """A server that Python runs with these words; `errors` is the file that its log goes to."""
    command = [sys.executable, *words]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.fullmatch(r"serving gpt2(?:, minilm, smollm2)? on http://127\.0\.0\.1:(\d+)\n", line)
            assert found, line
            made = Server(process, int(found[1]))
            for _ in range(200):
                with contextlib.suppress(OSError):
                    made.get("/ready")
                    break
                time.sleep(0.05)
            yield made
        finally:
            process.kill()


def test_the_examples_of_the_page_run(server: Server) -> None:
    blocks = [b for b in blocks_of(PAGE, "serve.md") if "test_the_examples_of_the_page_run" in b.note]
    assert [block.language for block in blocks] == ["python", "python", "python", "bash"]
    *python, bash = (b.code.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}") for b in blocks)
    if shutil.which("curl"):
        done = subprocess.run(["bash", "-ec", bash], capture_output=True, text=True, timeout=60, check=True)
        completion, ranking = re.split(r"(?<=\})(?=\{)", done.stdout)
        assert json.loads(completion)["usage"]["completion_tokens"] <= 20
        assert len(json.loads(ranking)["results"]) == 2
    pytest.importorskip("openai")
    names: dict[str, Any] = {"__name__": "__main__"}

    def said(code: str) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "docs/serve.md", "exec"), names)
        return printed.getvalue()

    assert said(python[0]).splitlines()[-1].endswith("2 32")
    assert said(python[1])
    assert names["answer"].choices[0].message.role == "assistant"
    assert names["chunk"].choices[0].finish_reason in ("stop", "length")
    if find_spec("xgrammar"):
        assert said(python[2]).strip() in names["schema"]["properties"]["river"]["enum"]


def test_openais_client_reads_errors_and_log_probabilities(server: Server) -> None:
    openai: Any = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="x", max_retries=0)
    assert {model.id for model in client.models.list()} == {"gpt2", "minilm", "smollm2"}
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt3", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="gpt2", messages=[{"role": "user", "content": "hi"}])
    made = client.completions.create(model="gpt2", prompt="the river", echo=True, logprobs=2, max_tokens=1)
    logprobs = made.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.text_offset) == made.usage.total_tokens


def test_a_server_on_loopback_without_a_key_refuses_foreign_hosts(server: Server) -> None:
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/v1/models", headers={"Host": "evil.example"}
    )
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request, timeout=30)
    assert "gpt2" in server.get("/v1/models")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_pages(server: Server, stream: bool) -> None:
    before = server.metric("generated_tokens_total")
    server.ask(4000, stream).close()
    deadline = time.monotonic() + 60.0
    while server.metric("pages_held") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.metric("pages_held") == server.metric("running") == 0
    assert server.metric("generated_tokens_total") - before < 4000


def rest_of(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    connection.settimeout(60.0)
    received = b""
    with connection:
        while part := connection.recv(1 << 16):
            received += part
    return received


@pytest.mark.parametrize("stream", [True, False])
def test_sigterm_answers_those_that_wait_and_those_that_take_too_long(tmp_path: Path, stream: bool) -> None:
    serve_cases.save_gpt(tmp_path / "gpt2", n_positions=16384, n_embd=256, n_layer=4)
    program = (
        "from pathlib import Path; from fastattn.serve.options import ServeOptions; "
        "from fastattn.serve.server import serve; options = ServeOptions(drain=4.0, max_batch=1); "
        "serve([Path('gpt2')], '127.0.0.1', 0, options, lambda line: print(line, flush=True))"
    )
    log = tmp_path / "log"
    with log.open("w") as errors, started(["-c", program], tmp_path, errors) as server:
        running, waiting = server.ask(16000, stream), server.send(8)
        while not server.metric("waiting"):
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        answer = rest_of(waiting)
        assert time.monotonic() - begun < 4.0
        late = rest_of(running)
        assert server.process.wait(60) == 0
    assert answer.startswith(b"HTTP/1.1 503")
    assert stream or late.startswith(b"HTTP/1.1 503")
    for each in (answer, late):
        assert b'"code":"shutting_down"' in each.replace(b'": "', b'":"')
    assert "Traceback" not in log.read_text()


def test_sigterm_finishes_what_runs(server: Server) -> None:
    """The last of this file: it ends the server."""
    connection = server.ask(200)
    server.process.send_signal(signal.SIGTERM)
    received = b""
    with connection:
        while part := connection.recv(1 << 16):
            received += part
            if b"[DONE]" in received:
                break
    assert b'"finish_reason":"length"' in received
    assert server.process.wait(60) == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), timeout=5)
