"""The evidence run: all checks and benchmarks that need a GPU, within a given number of minutes.

gpu_evidence.py describes the files that it writes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import checkout
from evidence import carried, sections
from evidence import summary as evidence_summary
from evidence.probes import DIRECTIONS, switches_for
from evidence.sections import RESERVE, Report, Run, Section, switches
from measure import processes
from report import schema
from report.tables import BENCHES

FORMAT, VERSION = "fastattn-evidence", 1
LEAST_SECONDS = 15.0  # a section is not started with less time left
REPEATED = ("install", "build", "probe")  # of a machine, not of a commit: repeated by every run


def run_section(section: Section, run: Run) -> Report:
    """Run one section within its limit and the time left; its entry of the report, stored as it grows."""
    command = section.command(run)
    entry: Report = {"name": section.name, "status": "skipped", "seconds": 0.0, "detail": "", "findings": []}
    if isinstance(command, str):
        return {**entry, "detail": command}
    limit = min(section.limit, run.remaining)
    run.log(f"=== {section.name}: {' '.join(command[1:])}")
    running = {**entry, "status": "running"}
    run.report["sections"].append(running)
    last, ended = "", None
    # the section limits its own processes; here only its own limit counts, as under compute-sanitizer
    process = processes.Process(command, section_environment(section, run), checkout.ROOT, limit, heed=False)
    try:
        for _, event in processes.follow(process):
            if isinstance(event, processes.Ended):
                ended = event
                continue
            run.log(event.text)
            last = event.text.strip() or last
            if found := _finding(event.text):
                entry["findings"].append(found)
                running["findings"] = entry["findings"]
                run.store()
    except KeyboardInterrupt:
        ended = processes.Ended(None, time.monotonic() - process.started, "interrupted")
    finally:
        run.report["sections"].remove(running)
    assert ended is not None
    entry["seconds"] = round(ended.seconds, 1)
    entry["status"] = {0: "ok", None: "timeout"}.get(ended.code, "failed")
    entry["detail"] = schema.without_paths(_detail(ended, last, entry["findings"]))[:300]
    return entry


def section_environment(section: Section, run: Run) -> dict[str, str]:
    """The environment of a section: the run's, without the directions of the CUDA extension that it leaves out."""
    off = switches(section, run)
    environment = {name: value for name, value in run.environment.items() if name != "FASTATTN_DISABLE"}
    return (
        environment
        if not off or run.dry or section.name in REPEATED
        else {**environment, "FASTATTN_DISABLE": off}
    )


def _finding(line: str) -> Report | None:
    if not line.startswith('{"check"'):
        return None
    try:
        found: Report = json.loads(line)
    except ValueError:
        return None
    return found


def _detail(ended: processes.Ended, last: str, findings: list[Report]) -> str:
    code = ended.code
    late = f"{ended.why}; " if ended.why else ""
    if findings:
        counts = {
            s: sum(f["status"] == s for f in findings) for s in ("passed", "failed", "skipped", "not run")
        }
        text = late + ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        silent = code not in (0, None) and not counts["failed"]
        return f"exit status {code} after {text}: {last}" if silent else text
    if code is not None and code < 0:
        return f"killed by signal {-code}; {last}"
    return late + (last or "no output")


def place_checkout(run: Run, entry: Report) -> None:
    """If the install failed, let later processes import the checkout through a folder of links."""
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
    for item in (checkout.ROOT / "fastattn").iterdir():
        if item.name not in ("__pycache__", "kernels"):
            (package / item.name).symlink_to(item, target_is_directory=item.is_dir())
    (package / "kernels").symlink_to(checkout.ROOT / "kernels", target_is_directory=True)


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
        "disabled": "",
        "sections": [],
    }


def _environment(dry: bool) -> dict[str, str]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if dry:
        environment["TRITON_INTERPRET"] = "1"
        environment["CUDA_VISIBLE_DEVICES"] = ""
    benchmarks = str(checkout.BENCHMARKS)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [benchmarks, environment.get("PYTHONPATH")]))
    return environment


def run_all(options: argparse.Namespace) -> int:
    """Run the chosen sections, print and store their findings; 0 if no section that ran failed."""
    import torch

    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu" if options.dry_run else "cuda")
    if options.unpack is not None:
        carried.unpack(options.unpack, options.out)
    report = _new_report(device, options.dry_run, options.revision)
    report["sections"] = _kept_sections(options.out, report) if options.resume else []
    if not report["sections"]:
        for name in ("evidence", *BENCHES):
            (options.out / f"{name}.json").unlink(missing_ok=True)
        for name in ("log.txt", "table.txt"):
            (options.out / name).unlink(missing_ok=True)
    environment = _environment(options.dry_run)
    if options.triton_cache is not None:
        environment["TRITON_CACHE_DIR"] = str(carried.triton_cache(options.triton_cache, options.out))
    run = Run(
        options.out.resolve(), options.minutes, options.dry_run, environment, report, time.monotonic(),
        prebuilt=options.prebuilt and options.prebuilt.resolve(),
    )  # fmt: skip
    done = {entry["name"] for entry in report["sections"]}
    always = ("install",) if options.dry_run else REPEATED
    for section in sections.SECTIONS:
        wanted = not options.sections or section.name in (*options.sections, *always)
        if wanted and section.name not in done:
            _attempt(section, run)
            _archive(run, options.archive)
    measured = evidence_summary.load_all(run.out)
    table = evidence_summary.summary(report, measured)
    print("\n".join(["", *table]), flush=True)  # before anything that may take long or fail
    (run.out / "table.txt").write_text("\n".join(table) + "\n", encoding="utf-8")
    _archive(run, options.archive)
    if run.remaining > -RESERVE / 2:
        _draw(run, measured)
        _archive(run, options.archive, triton=environment.get("TRITON_CACHE_DIR"))
    if options.publish:
        print(f"published to {publish(run, measured).relative_to(checkout.ROOT)}")
    return 1 if any(entry["status"] in ("failed", "timeout") for entry in report["sections"]) else 0


def _kept_sections(out: Path, report: Report) -> list[Report]:
    """The sections of an earlier run on this device and commit that finished well; those of REPEATED are repeated."""
    try:
        earlier = json.loads((out / "evidence.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    alike = all(
        earlier.get(key) == report[key] for key in ("format", "version", "device", "revision", "dry_run")
    )
    if not alike:
        print("the earlier run was of another device, commit or kind: starting from the first section")
        return []
    return [
        entry for entry in earlier["sections"] if entry["status"] == "ok" and entry["name"] not in REPEATED
    ]


def _attempt(section: Section, run: Run) -> None:
    if run.remaining < LEAST_SECONDS:
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
    if section.name == "probe" and entry["status"] != "skipped":
        _switch_off(run, entry)
    run.report["sections"].append(entry)
    run.store()
    print(
        f"{entry['name']:<19} {entry['status']:<8} {entry['seconds']:6.1f} s  {entry['detail'][:120]}",
        flush=True,
    )


def _switch_off(run: Run, entry: Report) -> None:
    """Switch off, from now on, every direction whose probe did not pass."""
    run.report["disabled"] = switches_for(entry["findings"])
    off = [name for name, direction in DIRECTIONS.items() if set(direction.switches) <= set(run.disabled)]
    if off:
        entry["detail"] += f"; left out from now on: CUDA {', '.join(off)}"


def _archive(run: Run, folder: Path | None, triton: str | None = None) -> None:
    """Update the archive after each section, so that an interrupted run leaves its results."""
    if folder is None:
        return
    try:
        carried.pack(run.out, folder, triton)
    except OSError as error:
        print(f"the archive is as it was: {error}", file=sys.stderr)


def _draw(run: Run, measured: Sequence[schema.Result]) -> None:
    from report import charts

    try:
        for result in measured:
            charts.draw(result, run.out)
    except ImportError as error:
        print(f"no charts: {error}")


def publish(run: Run, measured: Sequence[schema.Result]) -> Path:
    """Copy the measurements to the results of this device, and update the pages and their charts."""
    from report import charts

    folder = schema.RESULTS / schema.folder_name(run.report["device"])
    for result in measured:
        schema.save(result, folder / f"{result['bench']}.json")
    try:
        charts.update_docs()
    except ImportError as error:
        print(f"pages are as they were: {error}")
    return folder
