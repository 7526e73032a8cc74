"""The sections of the evidence run, in order of importance: what each runs on a GPU, and in small on a CPU."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import checkout

ROOT = checkout.ROOT
BENCHMARKS = Path(__file__).resolve().parent
CHECKS = [sys.executable, str(BENCHMARKS / "gpu_checks.py")]
FASTATTN = [
    sys.executable,
    "-c",
    "import checkout; checkout.make_importable(); from fastattn.cli import main; main()",
]
RESERVE = 12.0  # seconds kept for the table and the charts
WORKERS = max(1, min(12, (os.cpu_count() or 1) - 2))  # processes that compile kernels side by side

Report = dict[str, Any]
Command = list[str] | str  # a command line, or why there is none here


@dataclass
class Run:
    """The options of this run, and what its sections share."""

    out: Path
    minutes: float
    dry: bool
    environment: dict[str, str]
    report: Report
    started: float
    log_limit: int = 12 * 2**20

    @property
    def remaining(self) -> float:
        """Seconds left before the reserve."""
        return self.minutes * 60 - (time.monotonic() - self.started) - RESERVE

    def store(self) -> None:
        """Replace evidence.json."""
        path = self.out / "evidence.json"
        partial = path.with_name("evidence.json.partial")
        partial.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    def log(self, text: str) -> None:
        """Append to log.txt, up to its limit."""
        path = self.out / "log.txt"
        if not path.exists() or path.stat().st_size + len(text) < self.log_limit:
            with path.open("a", encoding="utf-8") as file:
                file.write(text if text.endswith("\n") else text + "\n")


@dataclass(frozen=True)
class Section:
    """One step of the evidence: its limit in seconds, and its command, or why it has none here."""

    name: str
    limit: float
    command: Callable[[Run], Command]


def bench_script(name: str) -> Path:
    """The script of a bench."""
    return BENCHMARKS / f"bench_{name.replace('-', '_')}.py"


def _install(run: Run) -> Command:
    if run.dry:
        found = "import checkout; print('fastattn is found', checkout.make_importable())"
        return [sys.executable, "-c", found]
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-q"]
    return [*pip, "-e", str(ROOT)]


def _build(run: Run) -> Command:
    """The CUDA extension, into the user's cache, where later sections find it."""
    if not (ROOT / "fastattn" / "build.py").exists():
        return "this commit has no extension to build"
    import torch

    if torch.version.cuda is None:
        return "this torch is a CPU build: the extension is compiled against a CUDA build of torch"
    if shutil.which("nvcc") is None and not os.environ.get("CUDA_HOME"):
        return "no nvcc here"
    return [*FASTATTN, "build"]


def _tests(*selection: str) -> Callable[[Run], Command]:
    def command(run: Run) -> Command:
        line = [sys.executable, "-m", "pytest", "-q", "--no-header", "--maxfail=20", "-p", "no:cacheprovider"]
        line += [
            "-o",
            "addopts=--import-mode=importlib",
        ]  # the project's own ask for plugins that may be missing
        if find_spec("xdist") is not None and not run.dry:
            line += ["-n", str(WORKERS)]
        return [*line, *selection]

    return command


def _kernel_tests(run: Run) -> Command:
    if run.dry:
        return "the interpreter runs these tests wherever the suite runs; on a GPU they compile"
    return _tests("tests/kernels", "tests/backends")(run)


def _checks(*names: str, seconds: float) -> Callable[[Run], Command]:
    def command(run: Run) -> Command:
        line = [*CHECKS, *names, "--seconds", str(5.0 if run.dry else seconds)]
        return line if run.dry else [*line, "--workers", str(WORKERS)]

    return command


def _sanitized(run: Run) -> Command:
    """Few and small calls under compute-sanitizer, which stops at the first byte read or written out of bounds."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    line = [*CHECKS, "random", "kv-cache", "ops", "--seconds", "3" if run.dry else "12"]
    if run.dry:
        return line
    if tool is None:
        return "no compute-sanitizer here"
    exact = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]  # or a pool would hide small steps beyond a tensor
    return [*exact, tool, "--tool", "memcheck", "--error-exitcode", "9", "--print-limit", "5", *line]


def _tune(run: Run) -> Command:
    """A short search for tiles, into a cache of its own: it must not change what other sections measure."""
    if not (ROOT / "fastattn" / "tune").exists():
        return "this commit has no tuner"
    cache = ["env", f"FASTATTN_CACHE_DIR={run.out / 'tuned'}"]
    if run.dry:
        return [
            *cache,
            *FASTATTN,
            "bench",
            "tune",
            "--dry-run",
            "--head-dim",
            "64",
            "--dtype",
            "float16",
            "--quick",
        ]
    kinds = ["--head-dim", "128", "--dtype", "bfloat16", "--features", "plain", "--features", "causal"]
    return [*cache, *FASTATTN, "bench", "tune", *kinds, "--minutes", "1.2", "--jobs", str(WORKERS)]


def _bench(name: str, only: str, dry_only: str, contestants: str, seconds: float) -> Callable[[Run], Command]:
    def command(run: Run) -> Command:
        line = [sys.executable, str(bench_script(name)), "--cases-of", "cuda", "--merge"]
        line += ["--out", str(run.out / f"{name}.json"), "--contestants", contestants]
        line += ["--only", dry_only if run.dry else only]
        line += ["--quick"] if run.dry else ["--seconds", str(seconds), "--warm", str(WORKERS)]
        revision = run.report["revision"]
        return line + (["--revision", revision] if revision else [])

    return command


def _model_bench(name: str, only: str, dry_only: str, seconds: float) -> Callable[[Run], Command]:
    """A bench of whole models; in small without the compiled contestants, which take a minute each on a CPU."""

    def command(run: Run) -> Command:
        if find_spec("transformers") is None and run.dry:
            return "transformers, the peer, is not installed"
        contestants = "^(fastattn|transformers-(sdpa|eager)|floor-.*)$" if run.dry else "."
        line = _bench(name, only, dry_only, contestants, seconds)(run)
        assert isinstance(line, list)
        # a model compiles for minutes: in the measured process alone, not in one per case beforehand
        return [word for place, word in enumerate(line) if "--warm" not in (word, line[place - 1])]

    return command


FUSED = "fastattn|sdpa|flash_attn"  # all but FlexAttention, which compiles half a minute per shape
AND_FLEX = "fastattn|sdpa-cudnn|sdpa-flash|sdpa-efficient|flex"
PACKED = "fastattn|sdpa|varlen_attn|flash_attn|nested|xformers"
ANY = "."
SECTIONS = (
    Section("install", 60, _install),
    Section("build", 200, _build),
    Section("correctness", 120, _checks("random", "kv-cache", "cudnn-trap", seconds=40)),
    Section("forward", 110, _bench("attention", "^forward-", "^forward-causal-d(64|128)-s512$", FUSED, 0.6)),
    Section("backward", 130, _bench("attention", "^backward-", "^backward-causal-d(64|128)-s512$", FUSED, 0.6)),
    Section("decode", 70, _bench("decode", ANY, "1x2048$|ragged|paged$", "fastattn|sdpa|flash_attn", 0.5)),
    Section("features", 80, _bench("attention", "^feature-", "^feature-window$", FUSED, 0.8)),
    Section("varlen", 60, _bench("varlen", ANY, "^forward.backward-causal-512$", PACKED, 0.6)),
    Section("softmax", 60, _bench("softmax", ANY, "^forward.*-4096$", "fastattn|torch$|liger|quack", 0.4)),
    Section("train", 150, _model_bench("train", "^train-16x1024$", "^train-16x1024$", 4.0)),
    Section("gpu-tests", 150, _tests("-m", "gpu", "tests")),
    Section("ops", 60, _checks("ops", seconds=30)),
    Section("repetition", 75, _checks("bitwise", "wide-offsets", seconds=10)),
    Section("losses", 90, _bench("cross-entropy", ANY, "50257$", "fastattn|torch$|liger", 0.8)),
    Section("sanitizer", 120, _sanitized),
    Section("flex", 110, _bench("attention", "ward-.*s4096$", "^feature-softcap$", AND_FLEX, 0.6)),
    Section("flex-features", 90, _bench("attention", "^feature-", "^feature-alibi$", AND_FLEX, 0.8)),
    Section("flex-decode", 110, _bench("decode", "16x8192|ragged", "gqa-1x2048$", "fastattn|flex", 0.5)),
    Section("flex-varlen", 110, _bench("varlen", ANY, "^forward-encoder$", "fastattn|flex", 0.6)),
    Section("overhead", 40, _bench("overhead", ANY, "^softmax-forward$", ANY, 0.3)),
    Section("generate", 60, _model_bench("generate", ANY, "^1x128$", 2.0)),
    Section("swap", 90, _model_bench("swap", ANY, "^encoder$", 2.0)),
    Section("compiled-rows", 120, _bench("softmax", "(4096|262144|2048)$", "^forward-256$", "fastattn|compile", 0.4)),
    Section("train-rest", 150, _model_bench("train", "dropout|evaluate", "^evaluate-16x1024$", 3.0)),
    Section("tuning", 110, _tune),
    Section("kernel-tests", 120, _kernel_tests),
)  # fmt: skip
