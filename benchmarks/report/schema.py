"""The benchmark result files: where a run happened, what was measured, and the checks a file passes on save and load.

A result is one JSON object (docs/benchmarks.md shows it in full):
    format, version     FORMAT and VERSION below; any other pair is refused
    bench, date         which bench, and when it was saved (UTC)
    device              kind ("cpu" | "cuda"), name, threads, memory_gib, driver
    versions            python, platform, torch, triton, fastattn, cuda, cudnn
    revision, dirty     git commit of the checkout, and whether tracked files differed from it
    settings            the options of the run
    ceilings            measured in the same run: matmul_tflops by dtype, copy_gbps
    cases               each with name, group, label, axis, params, direction, dtype, flops, bytes, target and one row
                        per provider
Times are milliseconds per call, memory MiB above the inputs, flops counted from permitted pairs, bytes those that
every implementation must move.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import checkout

FORMAT = "fastattn-bench"
VERSION = 3
STATUSES = ("ok", "unavailable", "failed")
# "forward" is under no_grad; "forward-grad" records the graph of a backward that is not run.
DIRECTIONS = ("forward", "forward-grad", "backward", "forward+backward", "import")
ROOT = checkout.ROOT
# Results are stored in the checkout; benches that are installed without one store theirs in the working directory.
RESULTS = (
    ROOT / "benchmarks" / "results" if (ROOT / "pyproject.toml").exists() else Path("fastattn-benchmarks")
)
CPU_MAKERS = ("AMD", "Intel", "ARM", "Apple")  # as names of processors have them
_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])/(?:[\w.+@-]+/)+[\w.+@-]*")

Result = dict[str, Any]


def describe_device(device: torch.device) -> Result:
    """Kind, name, threads, memory and driver of the device that ran."""
    threads = torch.get_num_threads()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "kind": "cuda",
            "name": properties.name,
            "threads": threads,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "driver": _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        }
    return {
        "kind": "cpu",
        "name": f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores",
        "threads": threads,
        "memory_gib": _total_memory_gib(),
        "driver": None,
    }


def folder_name(device: Result) -> str:
    """The results folder of a device: a GPU's name such as "nvidia-h200", of a CPU its maker, as in "cpu-amd".

    Ratios differ between makers, whose processors the libraries below use to different degrees.
    """
    if device["kind"] != "cpu":
        return re.sub(r"[^a-z0-9]+", "-", device["name"].lower()).strip("-")
    maker = next((maker for maker in CPU_MAKERS if maker in device["name"]), None)
    return f"cpu-{maker.lower()}" if maker else "cpu"


def new_result(bench: str, device: torch.device, settings: Result) -> Result:
    """An empty result of this machine, revision and moment."""
    revision, dirty = _revision()
    return {
        "format": FORMAT,
        "version": VERSION,
        "bench": bench,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": describe_device(device),
        "versions": _versions(),
        "revision": revision,
        "dirty": dirty,
        "settings": settings,
        "ceilings": {"matmul_tflops": {}, "copy_gbps": None},
        "cases": [],
    }


def without_paths(text: str) -> str:
    """The text with absolute paths shortened to their last part, so that results name no folders of a machine."""
    return _ABSOLUTE_PATH.sub(lambda match: match.group().rstrip("/").rsplit("/", 1)[-1], text)


def save(result: Result, path: Path) -> None:
    """Validate, then replace the file atomically, so that an interrupted run leaves the last complete state."""
    validate(result)
    replace_file(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file atomically; its folder is made if needed.

    `fastattn.cache` has the same function, but results are also stored where fastattn cannot be imported.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def load(path: Path) -> Result:
    """A validated result; ValueError names the file and the fault."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        validate(result)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
    return result


def merge(into: Result, other: Result) -> Result:
    """`into` with the cases of `other`, those of the same name replaced; both must be of one device and commit."""
    for key in ("bench", "device", "revision"):
        if into[key] != other[key]:
            raise ValueError(f"cannot merge results that differ in {key}: {into[key]!r} and {other[key]!r}")
    cases = {case["name"]: case for case in into["cases"]}
    cases.update((case["name"], case) for case in other["cases"])
    ceilings = {**into["ceilings"], **other["ceilings"]}
    ceilings["matmul_tflops"] = {**into["ceilings"]["matmul_tflops"], **other["ceilings"]["matmul_tflops"]}
    return {
        **other,
        "dirty": into["dirty"] or other["dirty"],
        "ceilings": ceilings,
        "cases": list(cases.values()),
    }


def validate(result: Any) -> None:
    """ValueError naming the first field that is missing, of the wrong type or out of range."""
    _require(isinstance(result, dict), "result", "an object", result)
    tag = (result.get("format"), result.get("version"))
    _require(tag == (FORMAT, VERSION), "format, version", f"{FORMAT!r}, {VERSION}", tag)
    _fields(result, "result", bench=str, date=str, device=dict, versions=dict, settings=dict, ceilings=dict)
    _fields(result, "result", revision=(str, type(None)), dirty=bool, cases=list)
    datetime.strptime(result["date"], "%Y-%m-%dT%H:%M:%SZ")
    _fields(result["device"], "device", kind=str, name=str, threads=int)
    _fields(result["versions"], "versions", python=str, torch=str)
    _fields(result["ceilings"], "ceilings", matmul_tflops=dict, copy_gbps=(int, float, type(None)))
    names = [case.get("name") for case in result["cases"] if isinstance(case, dict)]
    _require(len(set(names)) == len(result["cases"]), "cases", "objects with distinct names", names)
    for case in result["cases"]:
        _validate_case(case)
    _no_paths(result, "result")


def _validate_case(case: Result) -> None:
    where = f"case {case['name']!r}"
    _fields(case, where, name=str, group=str, params=dict, direction=str, dtype=str, rows=list)
    _fields(case, where, flops=(int, float, type(None)), target=(dict, type(None)))
    _fields(case, where, label=str, bytes=(int, float, type(None)), axis=(dict, type(None)))
    if case["axis"] is not None:
        _fields(case["axis"], f"{where}: axis", name=str, value=(int, float), line=str)
    _require(
        case["direction"] in DIRECTIONS, f"{where}: direction", f"one of {DIRECTIONS}", case["direction"]
    )
    for row in case["rows"]:
        _require(isinstance(row, dict), f"{where}: rows", "objects", row)
        _validate_row(row, f"{where}, {row.get('provider')!r}")
    if case["target"] is not None:
        _fields(case["target"], f"{where}: target", provider=str, against=(str, type(None)))


def _validate_row(row: Result, where: str) -> None:
    _fields(row, where, provider=str, status=str)
    _require(row["status"] in STATUSES, f"{where}: status", f"one of {STATUSES}", row["status"])
    if row["status"] != "ok":
        _fields(row, where, reason=str)
        return
    _fields(row, where, time_ms=dict, error=(dict, type(None)), within_rule=(bool, type(None)))
    _fields(row, where, tflops=(int, float, type(None)), ceiling_share=(int, float, type(None)))
    number = (int, float, type(None))
    _fields(row, where, peak_memory_mib=number, host_ms=number, gbps=number)
    if "launches" in row:  # of kernels, where a bench counts them
        _fields(row, where, launches=int)
    _fields(row["time_ms"], f"{where}: time_ms", median=float, p20=float, p80=float, samples=int)
    time = row["time_ms"]
    in_order = 0 < time["p20"] <= time["median"] <= time["p80"] < math.inf and time["samples"] > 0
    _require(in_order, f"{where}: time_ms", "0 < p20 <= median <= p80", time)


def _require(condition: bool, field: str, needs: str, got: Any) -> None:
    if not condition:
        raise ValueError(f"{field} needs {needs}, got {str(got)[:200]}")


def _fields(value: Any, where: str, /, **types: Any) -> None:
    _require(isinstance(value, dict), where, "an object", value)
    for name, kinds in types.items():
        _require(name in value, f"{where}: {name}", "a value", "nothing")
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        good = isinstance(value[name], kinds) and (bool in kinds or not isinstance(value[name], bool))
        _require(good, f"{where}: {name}", " or ".join(kind.__name__ for kind in kinds), value[name])


def _no_paths(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            _no_paths(item, f"{where}.{name}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _no_paths(item, f"{where}[{index}]")
    elif isinstance(value, str):
        _require(_ABSOLUTE_PATH.search(value) is None, where, "text without a machine's paths", value)
    elif isinstance(value, float):
        _require(math.isfinite(value), where, "a finite number", value)


def _versions() -> dict[str, str | None]:
    checkout.make_importable()
    from fastattn import versions

    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": versions.find("triton"),
        "fastattn": versions.find("fastattn"),
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()) if torch.backends.cudnn.is_available() else None,
    }


def _revision() -> tuple[str | None, bool]:
    if not (ROOT / "pyproject.toml").exists():
        return None, False  # not a checkout: a repository around it is somebody else's
    commit = _first_line(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    changed = _first_line(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return commit, changed is not None


def _first_line(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _total_memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")
