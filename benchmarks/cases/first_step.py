"""A new process from its start to the beginning of a run's first step, with the data packed on disk before."""

from __future__ import annotations

import random
import re
import sys
import tempfile
import time
from pathlib import Path

import torch

from measure import harness
from measure.processes import Ended, Line, Process, follow
from measure.protocols import CannotRun
from report import schema

OURS = "fastattn"
ROUNDS = 15
LIMIT_MS = 3000.0
SECONDS = 120.0  # after which a process is stopped
DOCUMENTS, QUICK_DOCUMENTS = 20_000, 20  # of 50 to 500 tokens: 5.5 million
MARK = re.compile(r"first step of (\d+) rows after (\d+\.\d+) s without imports")
PROGRAM = """
import sys, time
folder, preset, threads = sys.argv[1:]
import torch
torch.set_num_threads(int(threads))
from fastattn.data import TokenStream
from fastattn.data.best_fit import BestFitDataset
from fastattn.models import GPT, GPTConfig
from fastattn.train import TrainConfig, Trainer
started = time.perf_counter()
data = BestFitDataset.of_stream(TokenStream.load(folder + "/stream"), 1024)
model = GPT(GPTConfig.preset(preset))
config = TrainConfig(output_dir=folder + "/run", max_steps=2, batch_size=2, overwrite=True)
trainer = Trainer(model, config, data)
def begin(*given):
    print(f"first step of {len(data)} rows after {time.perf_counter() - started:.6f} s without imports", flush=True)
    time.sleep(600)  # until it is stopped
model.register_forward_pre_hook(begin)
trainer.fit()
"""


def write_stream(folder: Path, documents: int) -> None:
    """A packed set of documents of random tokens, as `TokenStream.build` leaves one."""
    from fastattn.data import TokenStream

    class Numbers:
        eos_id, vocab_size = 0, 4096

        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            return [[drawn.randrange(1, self.vocab_size) for _ in range(int(text))] for text in texts]

    drawn = random.Random(7)
    TokenStream.build([str(drawn.randint(50, 500)) for _ in range(documents)], Numbers(), folder)  # type: ignore[arg-type]


def run_once(folder: Path, preset: str) -> float:
    """Seconds from a process's start to its first step; CannotRun with its last line where it comes to none."""
    place = schema.ROOT if (schema.ROOT / "pyproject.toml").exists() else None
    command = [sys.executable, "-c", PROGRAM, str(folder), preset, str(torch.get_num_threads())]
    last = "no output"
    started = time.perf_counter()
    for _, event in follow(Process(command, None, place, SECONDS)):
        if isinstance(event, Line):
            if MARK.search(event.text):
                return time.perf_counter() - started
            last = event.text.strip() or last
        elif isinstance(event, Ended):
            last = event.why or last
    raise CannotRun(schema.without_paths(last)[:300])


def first_step_case(quick: bool) -> schema.Result:
    """The case; its first process, which fills the system's cache, is not counted."""
    preset, documents = ("nano", QUICK_DOCUMENTS) if quick else ("gpt2", DOCUMENTS)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_stream(folder / "stream", documents)
        try:
            found = [run_once(folder, preset) for _ in range(1 if quick else ROUNDS + 1)]
        except CannotRun as reason:
            row: schema.Result = {"provider": OURS, "status": "failed", "reason": str(reason)}
        else:
            row = harness.timed_row(OURS, found if quick else found[1:])
    return {
        "name": "first-step",
        "group": "first-step",
        "params": {"documents": documents, "preset": preset},
        "direction": "forward+backward",
        "dtype": "float32",
        "label": f"a new process to the first step of {preset}, {documents} packed documents on disk",
        "axis": None,
        "flops": None,
        "bytes": None,
        "target": None if quick else {"provider": OURS, "against": None, "extra_ms": LIMIT_MS},
        "rows": [row],
    }
