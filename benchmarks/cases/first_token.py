"""A new process from its start to the first token: imports, loading a folder of weights, one step of generation.

Both figures come from the same processes: the whole time as the parent sees it, from starting the interpreter to the
line with the token, and the part after the imports as the process itself measures it. The folder was read before, so
that its pages are in the system's cache.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from measure import harness
from measure.processes import Ended, Line, Process, follow
from measure.protocols import CannotRun
from peers.llama import save_llama
from report import schema

OURS, PEER = "fastattn", "transformers"
ROUNDS = 15
SECONDS = 120.0  # after which a process is stopped
# 12 layers and an untied head of Llama's shape: 500 MB in float32
PRESET = "smollm-135m"
SIZES = {
    "n_embd": 768, "n_layer": 12, "n_head": 12, "num_kv_heads": 4, "n_inner": 2048, "vocab_size": 32000,
    "tie_word_embeddings": False,
}  # fmt: skip
MARK = re.compile(r"first token (\d+) after (\d+\.\d+) s without imports")
PROGRAM = """
import sys, time
provider, folder, threads = sys.argv[1:]
import torch
torch.set_num_threads(int(threads))
if provider == "fastattn":
    from fastattn.models import load
else:
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama
    load = AutoModelForCausalLM.from_pretrained
started = time.perf_counter()
model = load(folder)
ids = torch.tensor([[3, 29, 31, 25]])
out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
token = int(out[0, -1])
print(f"first token {token} after {time.perf_counter() - started:.6f} s without imports", flush=True)
"""


class Run(NamedTuple):
    """The figures of one process."""

    token: int
    whole: float  # seconds from its start to the token
    after_imports: float  # seconds


class Measured(NamedTuple):
    """The figures of all processes of both libraries."""

    megabytes: int
    runs: dict[str, list[Run]]
    reasons: dict[str, str]  # why a provider has no runs


def run_once(provider: str, folder: Path) -> Run:
    """Start a process and stop it once it has printed the token; CannotRun with its last line if it prints none."""
    place = schema.ROOT if (schema.ROOT / "pyproject.toml").exists() else None
    command = [sys.executable, "-c", PROGRAM, provider, str(folder), str(torch.get_num_threads())]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    last = "no output"
    started = time.perf_counter()
    for _, event in follow(Process(command, environment, place, SECONDS)):
        if isinstance(event, Line):
            found = MARK.search(event.text)
            if found:
                return Run(int(found[1]), time.perf_counter() - started, float(found[2]))
            last = event.text.strip() or last
        elif isinstance(event, Ended):
            last = event.why or last
    raise CannotRun(schema.without_paths(last)[:300])


@functools.cache
def measure(quick: bool) -> Measured:
    """Interleaved processes of both libraries on one folder; the first round, which fills the cache, is not counted."""
    runs: dict[str, list[Run]] = {OURS: [], PEER: []}
    reasons: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        size = save_llama(folder, "" if quick else PRESET, **SIZES)
        for number in range(1 if quick else ROUNDS + 1):
            names = [name for name in runs if name not in reasons]
            for provider in names if number % 2 else names[::-1]:
                try:
                    run = run_once(provider, folder)
                except CannotRun as reason:
                    reasons[provider] = str(reason)
                    continue
                if quick or number > 0:
                    runs[provider].append(run)
    return Measured(round(size / 1e6), runs, reasons)


def first_token_case(quick: bool) -> schema.Result:
    """The case of the time to the first token with imports."""
    target: schema.Result = {"provider": OURS, "against": PEER, "time": 0.6}
    return _entry(measure(quick), "first-token", "imports included", lambda run: run.whole, target, quick)


def first_token_loaded_case(quick: bool) -> schema.Result:
    """The case of the time to the first token without imports."""
    target: schema.Result = {"provider": OURS, "against": PEER, "time": 1.0}
    measured, words = measure(quick), "without imports"
    return _entry(measured, "first-token-no-imports", words, lambda run: run.after_imports, target, quick)


def _entry(
    measured: Measured,
    name: str,
    words: str,
    seconds: Callable[[Run], float],
    target: schema.Result,
    quick: bool,
) -> schema.Result:
    rows: list[schema.Result] = []
    for provider, runs in measured.runs.items():
        if provider in measured.reasons:
            # a peer that is not installed is unavailable; ours always runs
            status = "failed" if provider == OURS else "unavailable"
            rows.append({"provider": provider, "status": status, "reason": measured.reasons[provider]})
        else:
            rows.append(harness.timed_row(provider, [seconds(run) for run in runs]))
    return {
        "name": name,
        "group": "first-token",
        "params": {"megabytes": measured.megabytes},
        "direction": "forward",
        "dtype": "float32",
        "label": f"a new process, from a Llama folder of {measured.megabytes} MB to the first token, {words}",
        "axis": None,
        "flops": None,
        "bytes": None,
        "target": None if quick else target,
        "rows": rows,
    }
