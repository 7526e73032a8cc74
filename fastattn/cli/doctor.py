"""`fastattn doctor`: the state of this machine."""

from __future__ import annotations

from typing import Any

from fastattn.cli.command import JsonFlag, output, print_json
from fastattn.console import Output


def doctor(as_json: JsonFlag = False) -> None:
    """Report versions, devices, compilers, the extension, and for each backend whether it can run here or why not."""
    from fastattn.doctor import report

    found = report()
    if as_json:
        print_json(found)
    else:
        show(found, output(as_json))


def show(found: dict[str, Any], out: Output) -> None:
    """Print the report as text."""
    out.heading("Versions")
    about, versions = found["fastattn"] or {}, found["versions"]
    name = f"{about.get('version')}" + (f", git {about['revision']}" if about.get("revision") else "")
    rows = [["fastattn", name], *([p, v or "not installed"] for p, v in versions.items())]
    out.table(["package", "version"], [*rows, ["platform", found["platform"] or "unknown"]])

    out.heading("Devices")
    cpu = found["cpu"] or {}
    memory = f", {_gib(cpu['memory'])}" if cpu.get("memory") else ""
    threads = f"{cpu.get('cores')} cores usable, {cpu.get('torch_threads')} torch threads"
    rows = [["cpu", cpu.get("model") or "unknown", f"{threads}{memory}, {cpu.get('instructions')}"]]
    for index, gpu in enumerate(found["gpus"] or []):
        detail = f"capability {gpu['capability']}, {_gib(gpu['memory'])}, driver {gpu['driver'] or 'unknown'}"
        rows.append([f"gpu {index}", gpu["name"], detail])
    if not found["gpus"]:
        rows.append(["gpu", "none", "torch sees no CUDA device"])
    out.table(["device", "model", "detail"], rows)

    out.heading("Compilers and extension")
    tools = found["compilers"]
    rows = [
        [t, (v or {}).get("version") or "not found", (v or {}).get("path") or ""] for t, v in tools.items()
    ]
    extension = found["extension"] or {}
    rows.append(
        ["extension", "built" if extension.get("built") else "not built", extension.get("detail") or ""]
    )
    out.table(["tool", "version", "where"], rows)

    out.heading("Backends")
    rows = [[b["name"], "ok" if b["available"] else "no", b["reason"] or ""] for b in found["backends"] or []]
    out.table(["backend", "here", "reason"], rows)
    if found["environment"]:
        out.heading("Environment")
        out.table(["variable", "value"], [list(item) for item in found["environment"].items()])
    for name, error in found["errors"].items():
        out.line(f"could not read {name}: {error}", good=False)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
