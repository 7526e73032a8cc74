"""The compile table on file: what each configuration was compiled from, what came out, and the page drawn from it.

A row's key says what the compiler was given: the source of the kernel and of every device function it reaches, without
comments and docstrings, its arguments, constants, warps and stages, and the architecture. A row whose key is no longer
that of the tree is stale. Of a stale row, Triton's front end shows in a fraction of the time whether the code is still
the same, by the hash "ir"; only if not is it compiled again.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import cycles_record
import torch
from compile_inspect import AMD, Report

HERE = Path(__file__).parent
STORED = HERE / "compile_table.json"
DOCUMENT = HERE.parents[1] / "docs" / "compile_table.md"
Rows = Mapping[str, Mapping[str, Any]]
REGENERATE = "python tests/kernels/compile_matrix.py --write -j 4"


def row_key(launch: Any, arch: str) -> str:
    """What the compiler is given for a launch on an architecture, in 16 hex digits."""
    args = {name: _described(value) for name, value in launch.arguments.items()}
    given = [fingerprint(launch.kernel), args, launch.num_warps, launch.num_stages, arch]
    given += [launch.max_registers] if launch.max_registers is not None else []
    return hashlib.sha256(json.dumps(given).encode()).hexdigest()[:16]


@cache
def fingerprint(kernel: Any) -> str:
    """A hash of the code of a kernel, of the functions it calls and of the constants they use."""
    seen: dict[str, str] = {}
    _collect(kernel, seen)
    return hashlib.sha256(json.dumps(sorted(seen.items())).encode()).hexdigest()


def _collect(function: Any, seen: dict[str, str]) -> None:
    plain = inspect.unwrap(getattr(function, "fn", function))
    tree = ast.parse(textwrap.dedent(inspect.getsource(plain)))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    seen[f"{plain.__module__}.{plain.__qualname__}"] = ast.unparse(tree)
    for name in sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}):
        value = plain.__globals__.get(name)
        owner = getattr(inspect.unwrap(getattr(value, "fn", value)), "__module__", "") or ""
        if callable(value) and not isinstance(value, type) and owner.startswith("fastattn.kernels"):
            if f"{owner}.{name}" not in seen:
                _collect(value, seen)
        elif isinstance(value, (int, float, str, tuple)) or type(value).__name__ == "constexpr":
            seen[f"{plain.__module__}.{name}"] = repr(value)


def _described(value: Any) -> str:
    """An argument as far as the compiler sees it: a tensor's dtype, a descriptor's block, everything else by value."""
    if hasattr(value, "block_shape"):
        return f"{value.base.dtype} in blocks {value.block_shape}"
    if isinstance(value, tuple) and any(isinstance(part, torch.Tensor) for part in value):
        return str([_described(part) for part in value])
    return str(value.dtype) if isinstance(value, torch.Tensor) else repr(value)


def load() -> dict[str, Any]:
    """The table on file: {"triton": version, "rows": {name: {"key", "ir", figures that are not zero}}}."""
    if not STORED.exists():
        return {"triton": None, "rows": {}}
    table: dict[str, Any] = json.loads(STORED.read_text(encoding="utf-8"))
    return table


def report_of(row: Mapping[str, Any]) -> Report:
    """The report in a row on file."""
    return Report(**{name: value for name, value in row.items() if name not in ("key", "ir")})


def row_of(key: str, ir: str, report: Report) -> dict[str, Any]:
    """A row for the file."""
    return {"key": key, "ir": ir} | {name: value for name, value in asdict(report).items() if value}


def store(triton: str, rows: Rows, entries: Iterable[Any]) -> None:
    """Write the table, one line per row, and the page."""
    lines = [f"  {json.dumps(name)}: {json.dumps(rows[name])}" for name in sorted(rows)]
    text = f'{{\n "triton": {json.dumps(triton)},\n "rows": {{\n' + ",\n".join(lines) + "\n }\n}\n"
    STORED.write_text(text, encoding="utf-8")
    DOCUMENT.write_text(render(load(), entries), encoding="utf-8")


def render(table: Mapping[str, Any], entries: Iterable[Any]) -> str:
    """docs/compile_table.md: a summary of the architectures, then per kernel a line per configuration."""
    entries = [entry for entry in entries if entry.name in table["rows"]]
    architectures = list(dict.fromkeys(entry.arch for entry in entries))
    lines = [
        "# What the compiler makes of the Triton kernels",
        "",
        f"Every configuration of `kernels/tiles.py`, `decode_tiles.py` and `row_tiles.py`, compiled ahead of time by "
        f"Triton {table['triton']}. Written by `{REGENERATE}`, which compiles only what has changed since; a test "
        "fails when this page is older than the kernels or the tiles.",
        "",
        "| architecture | configurations | most shared memory, KiB | limit, KiB | of them spill | of these must not |",
        "|---|---|---|---|---|---|",
    ]
    for arch in architectures:
        lines.append(_summary(arch, [entry for entry in entries if entry.arch == arch], table["rows"]))
    lines += [
        "",
        "A cell is the tile (queries x keys, warps, stages), registers per thread, shared memory in KiB, then, where "
        "there are any, loads and stores of local memory in the machine code (spills) and asynchronous matrix "
        "instructions (wgmma, tcgen05). Of gfx942 only the tile and the shared memory are known. The 16-bit attention "
        "rows of sm_90 also have cycles for 64 x 128 scores by the cycle model (docs/hopper.md: a model, not a "
        f"measurement), the unit in use most and its share of them, written by `{cycles_record.REGENERATE}`.",
    ]
    for kernel in dict.fromkeys(entry.kernel for entry in entries):
        lines += _kernel_lines(
            kernel, [e for e in entries if e.kernel == kernel], architectures, table["rows"]
        )
    lines += cycles_record.cuda_lines(_cycles())
    return "\n".join(lines) + "\n"


def _kernel_lines(kernel: str, entries: list[Any], architectures: list[str], rows: Rows) -> list[str]:
    """The table of one kernel: a line per configuration, a column per architecture."""
    titles = ["bits", entries[0].size_name, "features", *map(_title, architectures)]
    lines = ["", f"## {kernel}", "", f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    found = {(e.bits, e.size, e.features, e.arch): _cell(e, rows) for e in entries}
    for configuration in dict.fromkeys(key[:3] for key in found):
        cells = [found.get((*configuration, arch), "") for arch in architectures]
        lines.append(f"| {' | '.join(map(str, [*configuration, *cells]))} |")
    return lines


def _title(arch: str) -> str:
    return arch if arch == AMD else f"sm_{arch}"


def _summary(arch: str, entries: list[Any], rows: Rows) -> str:
    reports = [(entry, report_of(rows[entry.name])) for entry in entries]
    most = max(report.shared for _, report in reports)
    spilling = [entry for entry, report in reports if report.local_ops]
    strict = sum(entry.strict for entry in spilling)
    counts = ("not known", "") if arch == AMD else (str(len(spilling)), str(strict))
    limit = entries[0].shared_limit // 1024
    return f"| {_title(arch)} | {len(entries)} | {most // 1024} | {limit} | {counts[0]} | {counts[1]} |"


@cache
def _cycles() -> Rows:
    """The cycle model's figures on file."""
    rows: Rows = cycles_record.load()["rows"]
    return rows


def _cell(entry: Any, rows: Rows) -> str:
    report = report_of(rows[entry.name])
    if report.error:
        return f"failed: {report.error}"
    parts = [entry.tile]
    parts += [f"{report.registers} regs"] if report.registers else []
    parts.append(f"{-(-report.shared // 1024)} KiB")
    parts += [f"{report.local_ops} spills"] if report.local_ops else []
    parts += [f"{report.async_mma} mma"] if report.async_mma else []
    modelled = cycles_record.cell(entry.name, _cycles())
    parts += [modelled] if modelled else []
    return "; ".join(parts)
