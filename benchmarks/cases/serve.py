"""A server of the package under load, beside transformers and offline calls; in processes of their own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cases.serve_faults import WORDS, faults
from measure import harness
from measure.http_client import Answer, gaps, get, metric, p95, post
from measure.protocols import CannotRun
from peers.encoders import embedding_folder, sentences
from peers.served import Sample, generate_batch, one_at_a_time
from report import figures, schema

OURS, GENERATE, CONTINUOUS, OFFLINE = (
    "fastattn",
    "transformers-generate",
    "transformers-generate-batch",
    "offline",
)
BESIDE, EARLIER = "fastattn-beside-512", "after-200-requests"
TINY = {"n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
SMALL = {"n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}  # GPT-2
CLIENTS, TOKENS, LONG = 16, 32, 512
START_SECONDS = 120.0


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
    """A server of a folder: its port and its process id; CannotRun if it does not get ready."""
    words = [sys.executable, "-m", "fastattn", "serve", str(folder), "--device=cpu", "--port=0", *options]
    place = schema.ROOT if (schema.ROOT / "pyproject.toml").exists() else None
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=log, text=True, cwd=place, env=threads
        ) as process,
    ):
        try:
            assert process.stdout is not None
            _, _, port = process.stdout.readline().rpartition(":")
            if not port.strip().isdigit() or not _ready(int(port)):
                log.seek(0)
                said = log.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
                raise CannotRun(schema.without_paths(f"the server did not start: {said[-1]}")[:300])
            yield int(port), process.pid
        finally:
            process.terminate()
            process.wait(60)


def _ready(port: int) -> bool:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(OSError, EOFError):
            if asyncio.run(get(port, "/ready")).status == 200:
                return True
        time.sleep(0.01)
    return False


@contextlib.contextmanager
def served_gpt(sizes: Mapping[str, Any], *options: str) -> Iterator[tuple[int, int, Path]]:
    """A server of a GPT with random weights: its port, its process id and the folder."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "gpt"
        save_model(folder, **sizes)
        with serving(folder, *options) as (port, process):
            yield port, process, folder


def prompts(count: int = CLIENTS) -> list[list[int]]:
    """Prompts of 8 to 23 tokens, no two with the same beginning."""
    return [[number + 2] * (8 + number * 7 % 16) for number in range(count)]


async def streams(port: int, of: Sequence[Sequence[int]], tokens: int) -> list[Answer]:
    """The answers to prompts that are asked for at the same time, `tokens` for each; ValueError if one is cut short."""
    more = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    answers = await asyncio.gather(*(post(port, {"prompt": list(each), **more}) for each in of))
    for answer in answers:
        if answer.status != 200 or b'"finish_reason":"length"' not in answer.body:
            raise ValueError(f"a stream ended with status {answer.status}: {answer.body[-200:]!r}")
    return list(answers)


def rounds_of(samples: Mapping[str, Sample], rounds: int) -> list[schema.Result]:
    """The rows of providers that take turns, in an order that rotates; a first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in samples}
    reasons: dict[str, str] = {}
    names = list(samples)
    for number in range(rounds + (rounds > 1)):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            if name in reasons:
                continue
            try:
                with harness.without_collections():  # which take the client's processors from the server
                    took = samples[name]()
            except Exception as error:
                if name.startswith(OURS):
                    raise
                reasons[name] = schema.without_paths(f"{type(error).__name__}: {error}".splitlines()[0])[:300]
                continue
            if number or rounds == 1:
                seconds[name].append(took)
    return [
        {"provider": name, "status": "unavailable", "reason": reasons[name]}
        if name in reasons
        else harness.timed_row(name, seconds[name])
        for name in names
    ]


def entry(
    name: str,
    label: str,
    params: schema.Result,
    target: schema.Result,
    quick: bool,
    rows: Callable[[], list[schema.Result]],
    dtype: torch.dtype = torch.float32,
) -> schema.Result:
    """A case's entry of a result; a server that cannot run has a row with the reason."""
    try:
        made = rows()
    except Exception as error:
        reason = schema.without_paths(f"{type(error).__name__}: {error}".splitlines()[0])[:300]
        made = [{"provider": target["provider"], "status": "failed", "reason": reason}]
    return {
        "name": name, "group": "serve", "params": params, "direction": "forward",
        "dtype": schema.dtype_name(dtype), "label": label, "axis": None, "flops": None, "bytes": None,
        "target": None if quick else target, "rows": made,
    }  # fmt: skip


def clients_case(quick: bool) -> schema.Result:
    """Tokens of 16 streams at once beside transformers' generate for one prompt at a time; milliseconds of a token."""
    return _throughput("clients-16", GENERATE, 8.0, TOKENS, 15, quick)


def bfloat16_case(quick: bool) -> schema.Result:
    """The same with weights in bfloat16 on both sides."""
    return _throughput("clients-16-bfloat16", GENERATE, 8.0, TOKENS, 15, quick, torch.bfloat16)


def continuous_case(quick: bool) -> schema.Result:
    """The same beside transformers' continuous batching."""
    return _throughput("clients-16-continuous", CONTINUOUS, 1.5, TOKENS // 2, 3, quick)


def _throughput(
    name: str, peer: str, speed: float, tokens: int, rounds: int, quick: bool,
    dtype: torch.dtype = torch.float32,
) -> schema.Result:  # fmt: skip
    count, tokens = (3, 4) if quick else (CLIENTS, tokens)

    def rows() -> list[schema.Result]:
        served = served_gpt(TINY if quick else SMALL, f"--dtype={schema.dtype_name(dtype)}")
        with served as (port, _, folder):

            def ours() -> float:
                started = time.perf_counter()
                asyncio.run(streams(port, prompts(count), tokens))
                return (time.perf_counter() - started) / (count * tokens)

            make = {GENERATE: one_at_a_time, CONTINUOUS: generate_batch}[peer]
            try:
                theirs = make(folder, prompts(count), tokens, dtype)
            except Exception as error:  # as a row with the reason
                theirs = _raising(error)
            return rounds_of({OURS: ours, peer: theirs}, 1 if quick else rounds)

    label = f"a token of {count} streams at once, {tokens} tokens after prompts of 8 to 23, beside {peer}"
    label = ", ".join([label, *figures.unusual(dtype, "forward+backward")])
    target = {"provider": OURS, "against": peer, "speed": speed}
    return entry(name, label, {"clients": count, "tokens": tokens}, target, quick, rows, dtype)


def _raising(error: Exception) -> Sample:
    def sample() -> float:
        raise error

    return sample


def gaps_case(quick: bool) -> schema.Result:
    """The 95th percentile of the time between tokens of running streams, with and without a long prompt beside."""
    count, tokens, long = (2, 60, 64) if quick else (CLIENTS - 1, 48, LONG)

    def rows() -> list[schema.Result]:
        with served_gpt(TINY if quick else SMALL) as (port, _, _):
            begin = iter(range(2, 200))

            def quiet() -> float:
                return asyncio.run(_gaps(port, count, tokens, None))

            def beside() -> float:  # another prompt each time, as pages of a known one are not computed again
                return asyncio.run(_gaps(port, count, tokens, [next(begin)] * long))

            return rounds_of({OURS: quiet, BESIDE: beside}, 1 if quick else 3)

    label = f"95th percentile between tokens of {count} streams while a prompt of {long} tokens comes in"
    target = {"provider": BESIDE, "against": OURS, "time": 2.0}
    return entry(
        "between-tokens", label, {"clients": count, "tokens": tokens, "prompt": long}, target, quick, rows
    )


async def _gaps(port: int, count: int, tokens: int, long: list[int] | None) -> float:
    running = asyncio.ensure_future(streams(port, prompts(count), tokens))
    while not running.done() and (await metric(port, "running") < count or await metric(port, "waiting")):
        await asyncio.sleep(0.02)
    first = time.perf_counter()
    if long is not None:
        answer = await post(port, {"prompt": long, "max_tokens": 1, "temperature": 0})
        if answer.status != 200:
            raise ValueError(f"the long prompt got status {answer.status}")
    last = time.perf_counter()
    answers = await running
    if long is None:  # while all of them run, behind their own prompts
        first, last = max(a.times[0] for a in answers), min(a.times[-1] for a in answers)
    return p95([gap for answer in answers for at, gap in gaps(answer) if first <= at <= last])


def embeddings_case(quick: bool) -> schema.Result:
    """Texts that several clients embed beside the same texts in one offline call."""
    count, each = (12, 4) if quick else (256, 16)

    def rows() -> list[schema.Result]:
        from fastattn.models import BertForEmbedding

        texts = sentences(count)
        with tempfile.TemporaryDirectory() as root:
            folder = embedding_folder("" if quick else "minilm-l6", Path(root), texts)
            offline = BertForEmbedding.from_pretrained(folder)
            with serving(folder) as (port, _):

                def ours() -> float:
                    started = time.perf_counter()
                    asyncio.run(_embed(port, [texts[i : i + each] for i in range(0, count, each)]))
                    return time.perf_counter() - started

                def theirs() -> float:
                    started = time.perf_counter()
                    offline.encode(texts)
                    return time.perf_counter() - started

                return rounds_of({OURS: ours, OFFLINE: theirs}, 1 if quick else 7)

    label = f"{count} sentences embedded over HTTP, {each} in a request, beside one offline call"
    target = {"provider": OURS, "against": OFFLINE, "speed": 0.8}
    return entry("embeddings", label, {"texts": count, "texts_of_request": each}, target, quick, rows)


async def _embed(port: int, parts: Sequence[Sequence[str]]) -> None:
    bodies = [{"input": list(part), "encoding_format": "base64"} for part in parts]
    for answer in await asyncio.gather(*(post(port, body, "/v1/embeddings") for body in bodies)):
        if answer.status != 200:
            raise ValueError(f"an embedding got status {answer.status}: {answer.body[:200]!r}")


def ready_case(quick: bool) -> schema.Result:
    """From the command to the first answer of /ready; the folder was read before."""

    def rows() -> list[schema.Result]:
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root) / "gpt"
            save_model(folder, **(TINY if quick else SMALL))

            def ours() -> float:
                started = time.perf_counter()
                with serving(folder):
                    return time.perf_counter() - started

            return rounds_of({OURS: ours}, 1 if quick else 5)

    target = {"provider": OURS, "against": None, "extra_ms": 5000.0}
    return entry("ready", "from the command to ready, a GPT-2 small", {}, target, quick, rows)


def memory_case(quick: bool) -> schema.Result:
    """Resident memory of a server after 2,000 requests beside that after 200; the time is that of a request."""
    counts = (16, 48) if quick else (200, 2000)

    def rows() -> list[schema.Result]:
        made = []
        with served_gpt(TINY) as (port, process, _):
            sent = 0
            for name, count in zip((EARLIER, OURS), counts):
                started, before = time.perf_counter(), sent
                while sent < count:
                    size = min(CLIENTS, count - sent)
                    asyncio.run(_ask(port, range(sent, sent + size)))
                    sent += size
                row = harness.timed_row(name, [(time.perf_counter() - started) / (sent - before)])
                made.append({**row, "peak_memory_mib": round(resident_mib(process), 2)})
        return made[::-1]

    label = f"a request, and the server's memory after {counts[1]:,} beside that after {counts[0]:,}"
    target = {"provider": OURS, "against": EARLIER, "memory": 1.02}
    return entry("memory", label, {"requests": list(counts)}, target, quick, rows)


async def _ask(port: int, numbers: Sequence[int]) -> None:
    bodies = [{"prompt": [2 + number % 200] * 20, "max_tokens": 8} for number in numbers]
    for answer in await asyncio.gather(*(post(port, body) for body in bodies)):
        if answer.status != 200:
            raise ValueError(f"a request got status {answer.status}")


def resident_mib(process: int) -> float:
    """Resident memory of a process."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text(encoding="utf-8"))
    if not found:
        raise CannotRun("this system does not tell the memory of a process")
    return int(found[1]) / 1024


def faults_case(quick: bool) -> schema.Result:
    """Clients that misbehave: what was wrong is counted; the time is that of a request."""
    count = 60 if quick else 1000

    def rows() -> list[schema.Result]:
        # few pages, so that requests lose theirs in between
        with served_gpt(TINY, "--max-batch=8", "--kv-memory=1") as (port, _, _):
            started = time.perf_counter()
            report = asyncio.run(faults(port, count))
            row = harness.timed_row(OURS, [(time.perf_counter() - started) / count])
        return [
            {**row, "answers": report["answers"], "wrong": len(report["wrong"]), "first": report["wrong"][:5]}
        ]

    label = (
        f"{count:,} requests with cancels, broken and oversized bodies, slow readers and dropped connections"
    )
    target = {"provider": OURS, "against": None, "wrong": 0}
    return entry("faults", label, {"requests": count}, target, quick, rows)


CASES: dict[str, Callable[[bool], schema.Result]] = {
    "clients-16": clients_case,
    "clients-16-bfloat16": bfloat16_case,
    "clients-16-continuous": continuous_case,
    "between-tokens": gaps_case,
    "embeddings": embeddings_case,
    "ready": ready_case,
    "memory": memory_case,
    "faults": faults_case,
}
