"""The sections of the evidence run, in order of importance: the command of each on a GPU, and its small form on a CPU.

FIRST is the plan of the first ten minutes on a GPU, whose limits add up to no more than FIRST_SECONDS: the probes of
the CUDA extension, then correctness and the comparisons that decide what is built next. THEN follows if there is time.
LAST is the CUDA backward, which may hang although its probe did not; it is switched off in all sections before.
"""

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
from evidence.first_run import sanitizer
from evidence.probes import DIRECTIONS
from report.schema import replace_file

CHECKS = [sys.executable, str(checkout.BENCHMARKS / "gpu_checks.py")]
FASTATTN = [
    sys.executable,
    "-c",
    "import checkout; checkout.make_importable(); from fastattn.cli import main; main()",
]
RESERVE = 12.0  # seconds kept for the table and the charts
TEST_SECONDS, TEST_WORKERS = 40, 6  # limit of one test; processes, which share the device's memory
WORKERS = max(1, min(12, (os.cpu_count() or 1) - 2))  # processes that compile kernels side by side

Report = dict[str, Any]
Command = list[str] | str  # a command line, or the reason why there is none


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
    prebuilt: Path | None = None  # an extension that was built elsewhere for this Python, torch and sources

    @property
    def remaining(self) -> float:
        """Seconds left before the reserve."""
        return self.minutes * 60 - (time.monotonic() - self.started) - RESERVE

    def store(self) -> None:
        """Replace evidence.json."""
        replace_file(self.out / "evidence.json", json.dumps(self.report, indent=1) + "\n")

    def log(self, text: str) -> None:
        """Append to log.txt, up to its limit."""
        path = self.out / "log.txt"
        if not path.exists() or path.stat().st_size + len(text) < self.log_limit:
            with path.open("a", encoding="utf-8") as file:
                file.write(text if text.endswith("\n") else text + "\n")

    @property
    def disabled(self) -> list[str]:
        """The value of FASTATTN_DISABLE for every section: the directions whose probe failed or did not run."""
        return [name for name in self.report.get("disabled", "").split(",") if name]


@dataclass(frozen=True)
class Section:
    """One section: its limit in seconds, and its command or the reason why there is none."""

    name: str
    limit: float
    command: Callable[[Run], Command]
    cuda_backward: bool = False  # whether it may launch the CUDA extension's backward of attention


CUDA_BACKWARD = (*DIRECTIONS["backward two passes"].switches, *DIRECTIONS["backward one pass"].switches)


def switches(section: Section, run: Run) -> str:
    """FASTATTN_DISABLE for a section."""
    names = [*run.disabled, *([] if section.cuda_backward else CUDA_BACKWARD)]
    return ",".join(dict.fromkeys(names))


def bench_script(name: str) -> Path:
    """The script of a bench."""
    return checkout.BENCHMARKS / f"bench_{name.replace('-', '_')}.py"


def _install(run: Run) -> Command:
    if run.dry:
        found = "import checkout; print('fastattn is found', checkout.make_importable())"
        return [sys.executable, "-c", found]
    # without the extension, which the build section compiles
    pip = ["env", "FASTATTN_BUILD_CUDA=0", sys.executable, "-m", "pip", "install"]
    return [*pip, "--no-deps", "--no-build-isolation", "-q", "-e", str(checkout.ROOT)]


def _build(run: Run) -> Command:
    """The CUDA extension in the user's cache, where later sections find it: a prebuilt one, or compiled."""
    if not (checkout.ROOT / "fastattn" / "extension" / "build.py").exists():
        return "this commit has no extension to build"
    import torch

    if torch.version.cuda is None:
        return "this torch is a CPU build: the extension is compiled against a CUDA build of torch"
    if run.prebuilt is None and shutil.which("nvcc") is None and not os.environ.get("CUDA_HOME"):
        return "nvcc is not installed"
    carried = [] if run.prebuilt is None else ["--prebuilt", str(run.prebuilt)]
    return [sys.executable, str(checkout.BENCHMARKS / "gpu_build.py"), *carried]


def _probe(run: Run) -> Command:
    return [
        sys.executable,
        str(checkout.BENCHMARKS / "gpu_probes.py"),
        "--device",
        "cpu" if run.dry else "cuda",
    ]


def _first_run(*options: str, seconds: float) -> Callable[[Run], Command]:
    def command(run: Run) -> Command:
        if run.dry and "triton" in options:
            return "the interpreter runs these steps wherever the suite runs; on a GPU they compile"
        line = [sys.executable, str(checkout.BENCHMARKS / "first_run.py"), *options]
        return [*line, "--seconds", str(seconds), "--device", "cpu" if run.dry else "cuda"]

    return command


WITH_OWN_SECTIONS = ("tests/gpu/test_first_run.py",)  # tests with sections of their own
GPU_TESTS = (
    "tests/gpu",
    "tests/kernels/test_contract.py",
    "tests/ops/test_registration.py",
    "tests/integrations/test_torch.py",
    "tests/train/test_trainer.py",
    "tests/train/test_deterministic.py",
)


def _tests(*selection: str, marked: str = "") -> Callable[[Run], Command]:
    """Tests by file: a collection of all of them stops at the first module that needs another version of a library."""

    def command(run: Run) -> Command:
        line = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
        line += ["-p", "evidence.pytest_plugin"]  # reports failures as they happen
        # the project's own options ask for plugins that may be missing
        line += ["-o", "addopts=--import-mode=importlib", "-rfE", "--tb=short"]
        line += ["--continue-on-collection-errors", *(f"--ignore={path}" for path in WITH_OWN_SECTIONS)]
        if find_spec("pytest_timeout") is not None:
            # a test that waits for a kernel cannot be interrupted: its process ends, and xdist starts another one
            line += ["--timeout", str(TEST_SECONDS), "--timeout-method=thread"]
        if find_spec("xdist") is not None and not run.dry:
            line += ["-n", str(min(WORKERS, TEST_WORKERS))]
        if marked:
            line += ["-m", marked]
        return [*line, *(path for path in selection if (checkout.ROOT / path).exists())]

    return command


def _kernel_tests(run: Run) -> Command:
    if run.dry:
        return "the interpreter runs these tests wherever the suite runs; on a GPU they compile"
    return _tests("tests/kernels", "tests/backends")(run)


def _checks(*names: str, seconds: float, backends: tuple[str, ...] = ()) -> Callable[[Run], Command]:
    def command(run: Run) -> Command:
        line = [*CHECKS, *names, "--seconds", str(5.0 if run.dry else seconds)]
        line += ["--backends", *backends] if backends else []
        return line if run.dry else [*line, "--workers", str(WORKERS)]

    return command


def _sanitized(run: Run) -> Command:
    """Few and small calls under compute-sanitizer, which stops at the first byte read or written out of bounds."""
    tool = sanitizer()
    line = [*CHECKS, "--here", "random", "kv-cache", "ops", "--seconds", "3" if run.dry else "12"]
    if run.dry:
        return line
    if tool is None:
        return "compute-sanitizer is not installed"
    # in a memory pool, small accesses beyond a tensor stay undetected
    exact = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
    return [*exact, tool, "--tool", "memcheck", "--error-exitcode", "9", "--print-limit", "5", *line]


def _tune(run: Run) -> Command:
    """A short search for tiles, into a cache of its own: it must not change what other sections measure."""
    if not (checkout.ROOT / "fastattn" / "tune").exists():
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


def _bench(name: str, only: str, dry_only: str, providers: str, seconds: float) -> Callable[[Run], Command]:
    def command(run: Run) -> Command:
        line = [sys.executable, str(bench_script(name)), "--cases-of", "cuda", "--merge"]
        line += ["--out", str(run.out / f"{name}.json"), "--providers", providers]
        line += ["--only", dry_only if run.dry else only]
        line += ["--quick"] if run.dry else ["--seconds", str(seconds), "--warm", str(WORKERS)]
        revision = run.report["revision"]
        return line + (["--revision", revision] if revision else [])

    return command


def _model_bench(
    name: str, only: str, dry_only: str, seconds: float, chosen: str = "."
) -> Callable[[Run], Command]:
    """A bench of whole models; in small without the compiled providers, which take a minute each on a CPU."""

    def command(run: Run) -> Command:
        if find_spec("transformers") is None and run.dry:
            return "transformers, the peer, is not installed"
        providers = "^(fastattn|transformers-(sdpa|eager)|floor-.*)$" if run.dry else chosen
        line = _bench(name, only, dry_only, providers, seconds)(run)
        assert isinstance(line, list)
        # a model compiles for minutes: in the measured process alone, not in one per case beforehand
        return [word for place, word in enumerate(line) if "--warm" not in (word, line[place - 1])]

    return command


FUSED = "fastattn|sdpa|flash_attn"  # without FlexAttention, which compiles half a minute for each shape
AND_FLEX = "fastattn|sdpa-cudnn|sdpa-flash|sdpa-efficient|flex"
PACKED = "fastattn|sdpa|varlen_attn|flash_attn|nested|xformers"
EAGER = "^(fastattn|transformers-sdpa|floor-.*)$"  # no provider that torch.compile takes a minute for
ANY = "."
MEASURED = ("triton", "torch")
FORWARD_GRID = ("^forward-", "^forward-causal-d(64|128)-s512$")
BACKWARD_GRID = ("^backward-", "^backward-causal-d(64|128)-s512$")
FIRST_SECONDS = 500.0
FIRST = (
    Section("install", 15, _install),
    Section("build", 90, _build),
    Section("probe", 60, _probe),
    Section("correctness", 55, _checks("random", "kv-cache", seconds=25, backends=MEASURED)),
    Section("gpu-tests", 60, _tests(*GPU_TESTS, marked="gpu and not cuda_backend")),
    Section("ops", 35, _checks("ops", seconds=12)),
    Section("forward", 55, _bench("attention", *FORWARD_GRID, FUSED, 0.3)),
    Section("backward", 55, _bench("attention", *BACKWARD_GRID, FUSED, 0.3)),
    Section("decode", 40, _bench("decode", ANY, "1x2048$|ragged|paged$", "fastattn|sdpa|flash_attn", 0.3)),
    Section("bitwise", 30, _checks("bitwise", "few-key-heads", seconds=6)),
)
THEN = (
    Section("features", 80, _bench("attention", "^feature-", "^feature-window$", FUSED, 0.8)),
    Section("varlen", 60, _bench("varlen", ANY, "^forward.backward-causal-512$", PACKED, 0.6)),
    Section("softmax", 60, _bench("softmax", ANY, "^forward.*-4096$", "fastattn|torch$|liger|quack", 0.4)),
    Section("train", 90, _model_bench("train", "^train-16x1024$", "^train-16x1024$", 4.0, EAGER)),
    Section("tuning", 110, _tune),
    Section("first-run", 200, _first_run("--forward", seconds=190)),
    Section("first-run-triton", 120, _first_run("--backend", "triton", "--steps", *"1234567", seconds=110)),
    Section("cuda-forward", 60, _checks("random", "cudnn-trap", seconds=20, backends=("cuda",))),
    Section("cuda-tests", 90, _tests(*GPU_TESTS, marked="gpu and cuda_backend")),
    Section("int64-offsets", 60, _checks("cudnn-trap", "int64-offsets", seconds=10, backends=MEASURED)),
    Section("losses", 90, _bench("cross-entropy", ANY, "50257$", "fastattn|torch$|liger", 0.8)),
    Section("flex", 110, _bench("attention", "ward-.*s4096$", "^feature-softcap$", AND_FLEX, 0.6)),
    Section("flex-features", 90, _bench("attention", "^feature-", "^feature-alibi$", AND_FLEX, 0.8)),
    Section("flex-decode", 110, _bench("decode", "16x8192|ragged", "gqa-1x2048$", "fastattn|flex", 0.5)),
    Section("flex-varlen", 110, _bench("varlen", ANY, "^forward-encoder$", "fastattn|flex", 0.6)),
    Section("overhead", 40, _bench("overhead", ANY, "^softmax-forward$", ANY, 0.3)),
    Section("generate", 60, _model_bench("generate", ANY, "^1x128$", 2.0)),
    Section("models", 90, _model_bench("models", "^bert", "^bert-base-64x16-512$", 2.0)),
    Section("swap", 90, _model_bench("swap", ANY, "^encoder$", 2.0)),
    Section(
        "compiled-rows",
        120,
        _bench("softmax", "(4096|262144|2048)$", "^forward-256$", "fastattn|compile", 0.4),
    ),
    Section("train-compiled", 150, _model_bench("train", "^train-16x1024$", "^train-16x1024$", 4.0)),
    Section("train-rest", 150, _model_bench("train", "dropout|evaluate", "^evaluate-16x1024$", 3.0)),
    Section("sanitizer", 120, _sanitized),
    Section("kernel-tests", 120, _kernel_tests),
)
LAST = (
    Section(
        "cuda-backward", 70, _checks("random", "bitwise", seconds=20, backends=("cuda",)), cuda_backward=True
    ),
    Section(
        "cuda-backward-tests", 60, _tests("tests/gpu", marked="gpu and cuda_backend"), cuda_backward=True
    ),
    Section("cuda-backward-bench", 130, _bench("attention", *BACKWARD_GRID, FUSED, 0.6), cuda_backward=True),
    Section(
        "first-run-backward",
        400,
        _first_run("--backward", "--launches", "200", seconds=390),
        cuda_backward=True,
    ),
)
SECTIONS = (*FIRST, *THEN, *LAST)
