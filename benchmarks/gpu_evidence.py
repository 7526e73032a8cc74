"""Everything a machine with a GPU can prove, in one command and a given number of minutes, with no network.

    python benchmarks/gpu_evidence.py --minutes 9 --out evidence
    python benchmarks/gpu_evidence.py --dry-run                  on a CPU: every section in its small form, or why not
    python benchmarks/gpu_evidence.py --sections forward flex --resume

Sections run in order of importance, each in a process of its own with a limit of its own, so that a crash or a hang
costs one section. What finished is stored at once: evidence.json (sections and findings), attention.json (what was
measured), log.txt (all output), and the charts. It ends with a table one screen long.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import checkout
import figures
import schema

FORMAT, VERSION = "fastattn-evidence", 1
ROOT = checkout.ROOT
BENCH = [sys.executable, str(ROOT / "benchmarks" / "bench_attention.py")]
CHECKS = [sys.executable, str(ROOT / "benchmarks" / "gpu_checks.py")]
LOG_LIMIT = 12 * 2**20
RESERVE = 12.0  # seconds kept for the table and the charts
LEAST = 15.0  # a section is not begun with less time than this

Report = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """One step of the evidence: its limit in seconds, and its command, or why it has none here."""

    name: str
    limit: float
    command: Callable[[Run], list[str] | str]


@dataclass
class Run:
    """The options of this run, and what its sections share."""

    out: Path
    minutes: float
    dry: bool
    environment: dict[str, str]
    report: Report
    started: float

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
        if not path.exists() or path.stat().st_size + len(text) < LOG_LIMIT:
            with path.open("a", encoding="utf-8") as file:
                file.write(text if text.endswith("\n") else text + "\n")


def _install(run: Run) -> list[str] | str:
    if run.dry:
        return [
            sys.executable,
            "-c",
            "import checkout; print('fastattn is found', checkout.make_importable())",
        ]
    return [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-e",
        str(ROOT),
    ]


def _tests(*selection: str) -> Callable[[Run], list[str] | str]:
    def command(run: Run) -> list[str] | str:
        line = [sys.executable, "-m", "pytest", "-q", "--no-header", "--maxfail=20", "-p", "no:cacheprovider"]
        line += [
            "-o",
            "addopts=--import-mode=importlib",
        ]  # the project's own ask for a plugin that may be missing
        if find_spec("xdist") is not None and not run.dry:
            line += ["-n", str(WORKERS)]
        return [*line, *selection]

    return command


def _kernel_tests(run: Run) -> list[str] | str:
    if run.dry:
        return "the interpreter runs these tests wherever the suite runs; on a GPU they compile"
    return _tests("tests/kernels", "tests/backends")(run)


def _checks(*names: str, seconds: float) -> Callable[[Run], list[str] | str]:
    def command(run: Run) -> list[str] | str:
        line = [*CHECKS, *names, "--seconds", str(5.0 if run.dry else seconds)]
        return line if run.dry else [*line, "--workers", str(WORKERS)]

    return command


def _bench(only: str, dry_only: str, contestants: str, seconds: float) -> Callable[[Run], list[str] | str]:
    def command(run: Run) -> list[str] | str:
        line = [*BENCH, "--cases-of", "cuda", "--merge", "--json", str(run.out / "attention.json")]
        line += ["--only", dry_only if run.dry else only, "--contestants", contestants]
        line += ["--quick"] if run.dry else ["--seconds", str(seconds), "--warm", str(WORKERS)]
        revision = run.report["revision"]
        return line + (["--revision", revision] if revision else [])

    return command


WORKERS = max(1, min(12, (os.cpu_count() or 1) - 2))  # processes that compile kernels side by side
FUSED = "fastattn|sdpa|flash_attn"  # all but FlexAttention, which compiles half a minute per shape
AND_FLEX = "fastattn|sdpa-cudnn|sdpa-flash|sdpa-efficient|flex"
SECTIONS = (
    Section("install", 60, _install),
    Section("correctness", 120, _checks("random", "kv-cache", "cudnn-trap", seconds=40)),
    Section("forward", 110, _bench("^forward-", "^forward-causal-d(64|128)-s512$", FUSED, 0.6)),
    Section("backward", 130, _bench("^backward-", "^backward-causal-d(64|128)-s512$", FUSED, 0.6)),
    Section("gpu-tests", 120, _tests("-m", "gpu", "tests")),
    Section("features", 90, _bench("^feature-|^decode-", "^feature-window$", FUSED, 1.0)),
    Section("repetition", 75, _checks("bitwise", "wide-offsets", seconds=10)),
    Section("flex", 110, _bench("ward-.*s4096$", "^feature-softcap$", AND_FLEX, 0.6)),
    Section("flex-features", 90, _bench("^feature-", "^feature-alibi$", AND_FLEX, 1.0)),
    Section("kernel-tests", 120, _kernel_tests),
)


def run_section(section: Section, run: Run) -> Report:
    """Run one section within its limit and the time left; its entry of the report."""
    command = section.command(run)
    entry: Report = {"name": section.name, "status": "skipped", "seconds": 0.0, "detail": "", "findings": []}
    if isinstance(command, str):
        return {**entry, "detail": command}
    limit = min(section.limit, run.remaining)
    started = time.monotonic()
    code, output = run_limited(command, limit, run.environment)
    entry["seconds"] = round(time.monotonic() - started, 1)
    run.log(f"=== {section.name}: {' '.join(command[1:])}\n{output}")
    entry["findings"] = _findings(output)
    entry["status"] = {0: "ok", None: "timeout"}.get(code, "failed")
    entry["detail"] = schema.without_paths(_detail(section.name, code, limit, output, entry["findings"]))[
        :300
    ]
    return entry


def run_limited(command: Sequence[str], limit: float, environment: dict[str, str]) -> tuple[int | None, str]:
    """(exit status, output); None where the limit passed and the command, with all it started, was killed."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(max(limit, 1.0))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            code = None
        finally:
            _kill_group(process)
        output.seek(0)
        return code, output.read().decode("utf-8", "replace")


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _findings(output: str) -> list[Report]:
    found = []
    for line in output.splitlines():
        if line.startswith('{"check"'):
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def _detail(name: str, code: int | None, limit: float, output: str, findings: list[Report]) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    late = f"stopped after {limit:.0f} s; " if code is None else ""
    if findings:
        counts = {s: sum(f["status"] == s for f in findings) for s in ("passed", "failed", "skipped")}
        return late + ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    if code is not None and code < 0:
        return f"killed by signal {-code}; " + (lines[-1] if lines else "")
    return late + (lines[-1] if lines else "no output")


def place_checkout(run: Run, entry: Report) -> None:
    """Where the install failed, let every later process import the checkout through a folder of links."""
    if entry["status"] == "ok" or run.dry:
        return
    site = Path(tempfile.mkdtemp(prefix="fastattn-site-"))
    link_checkout(site)
    run.environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(site), run.environment.get("PYTHONPATH")])
    )
    run.environment["PYTHONSAFEPATH"] = (
        "1"  # keep the checkout itself off the path: it lacks fastattn.kernels
    )
    entry["detail"] += "; using the checkout in place"


def link_checkout(site: Path) -> None:
    """site/fastattn as setup.py would install it: the package's files, and kernels/ as fastattn.kernels."""
    package = site / "fastattn"
    package.mkdir(parents=True)
    for item in (ROOT / "fastattn").iterdir():
        if item.name != "__pycache__":
            (package / item.name).symlink_to(item, target_is_directory=item.is_dir())
    (package / "kernels").symlink_to(ROOT / "kernels", target_is_directory=True)


def summary(report: Report, measured: schema.Result | None) -> list[str]:
    """The table: sections, failed findings, the grids, the features."""
    device = report["device"]
    lines = [
        f"{device['name']}  torch {report['versions']['torch']}  commit {(report['revision'] or '?')[:10]}",
        "",
    ]
    for entry in report["sections"]:
        lines.append(
            f"  {entry['name']:<14} {entry['status']:<8} {entry['seconds']:6.1f} s  {entry['detail'][:90]}"
        )
    failed = [f for entry in report["sections"] for f in entry["findings"] if f["status"] == "failed"]
    lines += [f"  ! {f['check']} {f.get('backend', '')}: {f['detail'][:100]}" for f in failed[:6]]
    return lines if measured is None else [*lines, *_grid_summary(measured), *_feature_summary(measured)]


def _grid_summary(measured: schema.Result) -> list[str]:
    lines = []
    for direction in ("forward", "backward"):
        cases = [case for case in measured["cases"] if case["group"] == direction]
        for causal, dim in sorted(
            {(c["params"]["causal"], c["params"]["head_dim"]) for c in cases}, key=lambda k: (k[1], k[0])
        ):
            cells, ratios = [], []
            chosen = [c for c in cases if (c["params"]["causal"], c["params"]["head_dim"]) == (causal, dim)]
            for case in sorted(chosen, key=lambda c: int(c["params"]["seqlen_q"])):
                ours = figures.best_ours(case)
                ratio = figures.speed_ratio(ours, figures.best_peer(case))
                cells.append(f"{ours['tflops']:4.0f}" if ours else "   -")
                ratios += [ratio] if ratio else []
            mean = (
                f"{math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f}x the best peer"
                if ratios
                else "no ratio"
            )
            label = f"{direction:<8} {'causal' if causal else 'full':<6} d{dim:<3}"
            lines.append(f"  {label} TFLOP/s {' '.join(cells)}  {mean}")
    return ["", *lines] if lines else []


def _feature_summary(measured: schema.Result) -> list[str]:
    lines = []
    for case in measured["cases"]:
        if case["group"] in ("features", "decode"):
            ours, peer = figures.best_ours(case), figures.best_peer(case)
            ratio = figures.speed_ratio(ours, peer)
            if ours:
                against = f"{ratio:.2f}x {peer['contestant']}" if ratio and peer else "no peer ran"
                lines.append(f"  {case['name']:<22} {ours['time_ms']['median']:8.3f} ms  {against}")
    return ["", *lines] if lines else []


def _new_report(device: Any, dry: bool, revision: str | None) -> Report:
    described = schema.new_result("evidence", device, {})
    kept = {name: described[name] for name in ("device", "versions", "dirty")}
    date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    revision = revision or described["revision"]
    return {
        "format": FORMAT,
        "version": VERSION,
        "date": date,
        "dry_run": dry,
        "revision": revision,
        **kept,
        "sections": [],
    }


def _environment(dry: bool) -> dict[str, str]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if dry:
        environment["TRITON_INTERPRET"] = "1"
        environment["CUDA_VISIBLE_DEVICES"] = ""
    benchmarks = str(ROOT / "benchmarks")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [benchmarks, environment.get("PYTHONPATH")]))
    return environment


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 if no section that ran failed."""
    options = _parser().parse_args(argv)
    import torch

    if not torch.cuda.is_available() and not options.dry_run:
        print("no CUDA GPU here: --dry-run exercises every section in its small form", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu" if options.dry_run else "cuda")
    report = _new_report(device, options.dry_run, options.revision)
    report["sections"] = _kept_sections(options.out, report) if options.resume else []
    if not report["sections"]:
        for name in ("evidence.json", "attention.json", "log.txt"):
            (options.out / name).unlink(missing_ok=True)
    environment = _environment(options.dry_run)
    run = Run(options.out.resolve(), options.minutes, options.dry_run, environment, report, time.monotonic())
    done = {entry["name"] for entry in report["sections"]}
    for section in SECTIONS:
        wanted = not options.sections or section.name in (*options.sections, "install")
        if wanted and section.name not in done:
            _attempt(section, run)
    measured = _draw(run)
    print("\n".join(["", *summary(report, measured)]))
    return 1 if any(entry["status"] in ("failed", "timeout") for entry in report["sections"]) else 0


def _kept_sections(out: Path, report: Report) -> list[Report]:
    """The sections of an earlier run on this device and commit that finished well; the install is always repeated."""
    try:
        earlier = json.loads((out / "evidence.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    alike = all(
        earlier.get(key) == report[key] for key in ("format", "version", "device", "revision", "dry_run")
    )
    if not alike:
        print("the earlier run was of another device, commit or kind: starting anew")
        return []
    return [entry for entry in earlier["sections"] if entry["status"] == "ok" and entry["name"] != "install"]


def _attempt(section: Section, run: Run) -> None:
    if run.remaining < LEAST:
        entry: Report = {
            "name": section.name,
            "status": "not run",
            "seconds": 0.0,
            "detail": "no time left",
            "findings": [],
        }
    else:
        entry = run_section(section, run)
    if section.name == "install":
        place_checkout(run, entry)
    run.report["sections"].append(entry)
    run.store()
    print(
        f"{entry['name']:<14} {entry['status']:<8} {entry['seconds']:6.1f} s  {entry['detail'][:120]}",
        flush=True,
    )


def _draw(run: Run) -> schema.Result | None:
    path = run.out / "attention.json"
    if not path.exists():
        return None
    measured = schema.load(path)
    try:
        import plot

        plot.draw(measured, run.out)
    except ImportError as error:
        print(f"no charts: {error}")
    return measured


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Prove and measure fastattn on this machine's GPU.")
    names = [section.name for section in SECTIONS]
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything (default 9)")
    parser.add_argument("--out", type=Path, default=Path("evidence"), help="folder for the results")
    parser.add_argument(
        "--sections", nargs="+", choices=names, metavar="NAME", help=f"only these: {', '.join(names)}"
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep the sections of an earlier run that finished well"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="without a GPU: every section in its small form"
    )
    parser.add_argument("--revision", help="commit to record where the checkout has no git folder")
    return parser


if __name__ == "__main__":
    sys.exit(main())
