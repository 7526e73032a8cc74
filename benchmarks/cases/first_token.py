"""A new process from its start to the first token: imports, loading a folder of weights, one step of generation.

The folder is a Llama's, whose weights lie in the file as products read them, or a GPT-2's, whose lie transposed. The
floor is a process that imports torch alone, maps the file and multiplies the prompt's tokens with each matrix once.
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

from inputs.products import PRODUCTS
from measure import harness
from measure.processes import Ended, Line, Process, follow
from measure.protocols import CannotRun
from peers.gpt import save_gpt2
from peers.llama import save_llama
from report import schema

OURS, PEER = "fastattn", "transformers"
NAMES = {"llama": "Llama", "gpt2": "GPT-2"}
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
import importlib, sys, time
provider, folder, threads, kind = sys.argv[1:]
import torch
torch.set_num_threads(int(threads))
if provider == "fastattn":
    from fastattn.models import load
elif provider == "transformers":
    from transformers import AutoModelForCausalLM
    importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    load = AutoModelForCausalLM.from_pretrained
else:
    from safetensors import safe_open
started = time.perf_counter()
ids = torch.tensor([[3, 29, 31, 25]])
if provider in ("fastattn", "transformers"):
    model = load(folder)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
    token = int(out[0, -1])
else:
    token = 0
    with safe_open(f"{folder}/model.safetensors", framework="pt") as file:
        names = set(file.keys())
        for name in sorted(names):
            weight = file.get_tensor(name)
            looked_up = "wpe" in name or ("embed" in name and "lm_head.weight" in names)
            if weight.dim() == 2 and not looked_up:
                weight = weight.t() if kind == "gpt2" and "wte" not in name else weight
                torch.nn.functional.linear(torch.ones(ids.shape[1], weight.shape[1]), weight)
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


def run_once(provider: str, folder: Path, kind: str = "llama") -> Run:
    """Start a process and stop it once it has printed the token; CannotRun with its last line if it prints none."""
    place = schema.ROOT if (schema.ROOT / "pyproject.toml").exists() else None
    command = [sys.executable, "-c", PROGRAM, provider, str(folder), str(torch.get_num_threads()), kind]
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
def measure(quick: bool, kind: str = "llama") -> Measured:
    """Interleaved processes of both libraries and of the floor on one folder.

    The first round, which fills the cache, is not counted.
    """
    runs: dict[str, list[Run]] = {OURS: [], PEER: [], PRODUCTS: []}
    reasons: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if kind == "llama":
            size = save_llama(folder, "" if quick else PRESET, **SIZES)
        else:
            size = save_gpt2(folder, "" if quick or not PRESET else "gpt2")
        for number in range(1 if quick else ROUNDS + 1):
            names = [name for name in runs if name not in reasons]
            for provider in names if number % 2 else names[::-1]:
                try:
                    run = run_once(provider, folder, kind)
                except CannotRun as reason:
                    reasons[provider] = str(reason)
                    continue
                if quick or number > 0:
                    runs[provider].append(run)
    return Measured(round(size / 1e6), runs, reasons)


def first_token_case(quick: bool, kind: str = "llama") -> schema.Result:
    """The case of the time to the first token with imports."""
    target: schema.Result = {"provider": OURS, "against": PEER, "time": 0.6}
    return _entry(measure(quick, kind), kind, "", "imports included", lambda run: run.whole, target, quick)


def first_token_loaded_case(quick: bool, kind: str = "llama") -> schema.Result:
    """The case of the time to the first token without imports."""
    target: schema.Result = {"provider": OURS, "against": PEER, "time": 1.0}
    measured, name, words = measure(quick, kind), "-no-imports", "without imports"
    return _entry(measured, kind, name, words, lambda run: run.after_imports, target, quick)


def _entry(
    measured: Measured,
    kind: str,
    ending: str,
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
        "name": f"first-token{'' if kind == 'llama' else f'-{kind}'}{ending}",
        "group": "first-token",
        "params": {"megabytes": measured.megabytes},
        "direction": "forward",
        "dtype": "float32",
        "label": f"a new process, from a {NAMES[kind]} folder of {measured.megabytes} MB to the first token, {words}",
        "axis": None,
        "flops": None,
        "bytes": None,
        "target": None if quick else target,
        "rows": rows,
    }
