"""Everything a machine with a GPU can prove, in one command and a given number of minutes, with no network.

    python benchmarks/gpu_evidence.py --minutes 9 --out evidence
    python benchmarks/gpu_evidence.py --dry-run                  on a CPU: every section in its small form, or why not
    python benchmarks/gpu_evidence.py --sections forward flex --resume
    python benchmarks/gpu_evidence.py --resume --minutes 9 --publish

Sections run in order of importance, each in a process of its own with a limit of its own, so that a crash or a hang
costs one section. What finished is stored at once: evidence.json (sections and findings), BENCH.json (what was
measured), log.txt (all output), and the charts. It ends with a table one screen long.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import evidence_summary
import schema
from evidence_sections import ROOT, SECTIONS, Report, Run, Section
from tables import BENCHES

FORMAT, VERSION = "fastattn-evidence", 1
LEAST = 15.0  # a section is not begun with less time than this


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
        text = late + ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        silent = code not in (0, None) and not counts["failed"]
        return f"exit status {code} after {text}: {lines[-1]}" if silent else text
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

    if options.publish and options.dry_run:
        print("--publish goes with a GPU: small forms are no measurements", file=sys.stderr)
        return 2
    if not torch.cuda.is_available() and not options.dry_run:
        print("no CUDA GPU here: --dry-run exercises every section in its small form", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu" if options.dry_run else "cuda")
    report = _new_report(device, options.dry_run, options.revision)
    report["sections"] = _kept_sections(options.out, report) if options.resume else []
    if not report["sections"]:
        for name in ("evidence", *BENCHES):
            (options.out / f"{name}.json").unlink(missing_ok=True)
        (options.out / "log.txt").unlink(missing_ok=True)
    environment = _environment(options.dry_run)
    run = Run(options.out.resolve(), options.minutes, options.dry_run, environment, report, time.monotonic())
    done = {entry["name"] for entry in report["sections"]}
    for section in SECTIONS:
        wanted = not options.sections or section.name in (*options.sections, "install")
        if wanted and section.name not in done:
            _attempt(section, run)
    measured = evidence_summary.load_all(run.out)
    _draw(run, measured)
    print("\n".join(["", *evidence_summary.summary(report, measured)]))
    if options.publish:
        print(f"published to {publish(run, measured).relative_to(ROOT)}")
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


def _draw(run: Run, measured: Sequence[schema.Result]) -> None:
    import plot

    try:
        for result in measured:
            plot.draw(result, run.out)
    except ImportError as error:
        print(f"no charts: {error}")


def publish(run: Run, measured: Sequence[schema.Result]) -> Path:
    """Copy what was measured to the results of this device, and renew the pages and their charts."""
    import plot

    folder = schema.RESULTS / schema.folder_name(run.report["device"])
    for result in measured:
        schema.save(result, folder / f"{result['bench']}.json")
    try:
        plot.update_docs()
    except ImportError as error:
        print(f"pages are as they were: {error}")
    return folder


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
    parser.add_argument(
        "--publish",
        action="store_true",
        help="then copy the results to benchmarks/results/DEVICE and renew the pages",
    )
    parser.add_argument("--revision", help="commit to record where the checkout has no git folder")
    return parser


if __name__ == "__main__":
    sys.exit(main())
