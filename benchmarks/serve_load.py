"""`fastattn serve` under load: speed beside transformers, and whether it survives clients that misbehave.

python benchmarks/serve_load.py faults --requests 1000     cancels, broken bodies, slow readers, dropped connections
python benchmarks/serve_load.py speed                      16 clients of a GPT-2 beside generate, one at a time
python benchmarks/serve_load.py memory                     resident memory after 200 and after 2,000 requests

Models have random weights, and the server runs on the loopback address for as long as the measurement.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import checkout

HOST = "127.0.0.1"
WORDS = ("river", "tower", "the", "old", "sea", "runs", "in", "town", "a", "to")
TINY = {"n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
SMALL = {"n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}  # GPT-2
KINDS = ("healthy", "healthy", "cancelled", "malformed", "oversized", "slow reader", "dropped")
READ = 1 << 16
PATIENCE = 120.0


@dataclass
class Answer:
    """What came of a request: its status and body, and when each piece of the body arrived."""

    status: int = 0
    body: bytes = b""
    times: list[float] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text of a completion, streamed or not."""
        if not self.body.lstrip().startswith(b"data:"):
            return str(json.loads(self.body)["choices"][0]["text"])
        lines = re.findall(rb"^data: (\{.*)$", self.body, re.M)
        return "".join(choice["text"] for line in lines for choice in json.loads(line)["choices"])


def save_model(folder: Path, **sizes: Any) -> None:
    """A GPT with random weights and a tokenizer."""
    from fastattn.data import train_bpe
    from fastattn.models import GPT, GPTConfig

    tokenizer = train_bpe([" ".join(WORDS)] * 4, 280)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    vocab_size = 50257 if sizes["n_embd"] >= 768 else tokenizer.vocab_size
    GPT(GPTConfig(vocab_size=vocab_size, eos_token_id=0, pad_token_id=1, **sizes)).save_pretrained(folder)


@contextlib.contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[int, int]]:
    """A server of a folder: its port and its process id."""
    words = [sys.executable, "-m", "fastattn", "serve", str(folder), "--port=0", *options]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline().rpartition(":")[2])
            for _ in range(400):
                with contextlib.suppress(OSError):
                    if asyncio.run(get(port, "/ready")).status == 200:
                        break
                time.sleep(0.02)
            yield port, process.pid
        finally:
            process.terminate()
            process.wait(60)


async def get(port: int, path: str) -> Answer:
    """A GET."""
    return await send(port, f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode())


async def post(port: int, body: Any, **more: Any) -> Answer:
    """A POST to /v1/completions; `body` is bytes, or made JSON of."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    return await send(port, head.encode() + data, **more)


async def send(
    port: int, message: bytes, *, leave_after: int | None = None, pause: float = 0.0, cut: int | None = None
) -> Answer:
    """Send a request and read the answer.

    Args:
        leave_after: pieces of the answer after which the connection is closed.
        pause: seconds between reads.
        cut: bytes of the request after which the connection is closed.
    """
    reader, writer = await asyncio.open_connection(HOST, port, limit=1 << 12 if pause else 1 << 16)
    answer = Answer()
    try:
        writer.write(message[:cut])
        await writer.drain()
        if cut is not None:
            return answer
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)
        answer.status = int(head.split()[1])
        raw = b""
        while leave_after is None or len(answer.times) < leave_after:
            part = await asyncio.wait_for(reader.read(512 if pause else READ), PATIENCE)
            if not part:
                break
            raw += part
            answer.times.append(time.perf_counter())
            if pause:
                await asyncio.sleep(pause)
        answer.body = _unchunked(raw) if b"chunked" in head.lower() else raw
        return answer
    finally:
        writer.close()


def _unchunked(raw: bytes) -> bytes:
    body = b""
    while raw:
        size, _, rest = raw.partition(b"\r\n")
        count = int(size or b"0", 16)
        body += rest[:count]
        raw = rest[count + 2 :]
        if not count:
            break
    return body


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
        needed = {"malformed": 400, "oversized": 400, "dropped": 0}.get(kind, 200)
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


async def metric(port: int, name: str) -> float:
    """A gauge or a counter of /metrics."""
    text = (await get(port, "/metrics")).body.decode()
    found = re.search(rf"^fastattn_{name}\{{.*\}} (\S+)$", text, re.M)
    assert found, name
    return float(found[1])


async def speed(port: int, clients: int, tokens: int) -> dict[str, Any]:
    """Tokens per second of streams at once, and the time between tokens with and without a long prompt beside."""

    def body(number: int) -> dict[str, Any]:
        sampling = {"temperature": 0, "ignore_eos": True, "stream": True}
        return {"prompt": [number + 2] * 16, "max_tokens": tokens, **sampling}

    started = time.perf_counter()
    answers = await asyncio.gather(*(post(port, body(number)) for number in range(clients)))
    rate = clients * tokens / (time.perf_counter() - started)
    long = {"prompt": [3] * 512, "max_tokens": 1, "temperature": 0}
    running = asyncio.gather(*(post(port, body(number)) for number in range(clients)))
    while await metric(port, "running") < clients or await metric(port, "waiting"):
        await asyncio.sleep(0.05)
    before = time.perf_counter()
    await post(port, long)
    after = time.perf_counter()
    beside = await running
    # while all of them run, behind their own prompts
    begun, over = max(a.times[0] for a in answers), min(a.times[-1] for a in answers)
    quiet = _p95([gap for answer in answers for at, gap in _gaps(answer) if begun < at <= over])
    busy = _p95([gap for answer in beside for at, gap in _gaps(answer) if before <= at <= after])
    return {
        "clients": clients,
        "tokens": tokens,
        "tokens/s": round(rate, 2),
        "p95 between tokens, s": round(quiet, 4),
        "p95 beside a prompt of 512, s": round(busy, 4),
    }


def _gaps(answer: Answer) -> list[tuple[float, float]]:
    return [(later, later - earlier) for earlier, later in zip(answer.times, answer.times[1:])]


def _p95(gaps: list[float]) -> float:
    return statistics.quantiles(gaps, n=20)[-1] if len(gaps) > 1 else float("nan")


def theirs(folder: Path, tokens: int) -> dict[str, Any]:
    """Tokens per second of transformers' generate for one prompt at a time, in its best run."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.full((1, 16), 3)
    options = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 1}
    times = []
    for _ in range(4):
        started = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        times.append(time.perf_counter() - started)
    return {"transformers, one at a time, tokens/s": round(tokens / min(times), 2)}


async def memory(port: int, process: int, counts: tuple[int, int] = (200, 2000)) -> dict[str, Any]:
    """Resident memory of the server after so many requests, MB."""
    found, sent = {}, 0
    for count in counts:
        while sent < count:
            bodies = [{"prompt": [2 + (sent + i) % 200] * 20, "max_tokens": 8} for i in range(16)]
            await asyncio.gather(*(post(port, body) for body in bodies))
            sent += len(bodies)
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
        resident = re.search(r"VmRSS:\s+(\d+)", status)
        assert resident
        found[f"after {count}, MB"] = round(int(resident[1]) / 1024, 2)
    return found


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="A server under load.")
    parser.add_argument("what", choices=("faults", "speed", "memory"))
    parser.add_argument("--requests", type=int, default=1000, help="of the fault run")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24, help="of each stream")
    options = parser.parse_args()
    checkout.make_importable()
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "gpt"
        save_model(folder, **(SMALL if options.what == "speed" else TINY))
        if options.what == "speed":
            report |= theirs(folder, options.tokens)
        with serving(folder) as (port, process):
            if options.what == "faults":
                report |= asyncio.run(faults(port, options.requests, options.clients))
            elif options.what == "speed":
                report |= asyncio.run(speed(port, options.clients, options.tokens))
            else:
                report |= asyncio.run(memory(port, process))
    print(json.dumps(report, indent=1))
    return 1 if report.get("wrong") else 0


if __name__ == "__main__":
    sys.exit(main())
