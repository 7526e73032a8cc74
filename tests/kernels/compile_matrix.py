"""Compiles every row of tiles.py ahead of time, without a GPU, and reports registers, shared memory, spills and wgmma.

    python tests/kernels/compile_matrix.py                        the rows of sm_80 and sm_90
    python tests/kernels/compile_matrix.py --all                  every architecture
    python tests/kernels/compile_matrix.py --arch 90 --head-dim 128 --bits 16 --kernel forward

Prints a table; --write also stores it as docs/compile_table.md and compile_table.json beside this file. The exit
status is 1 where shared memory overflows, spills grow beyond those on record (for the same Triton), or a 16-bit row
without score features spills at all up to head dim 128 or lacks wgmma on sm_90.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
STORED = HERE / "compile_table.json"
DOCUMENT = HERE.parents[1] / "docs" / "compile_table.md"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
AMD = "gfx942"  # portability: must compile, nothing is held to a limit but shared memory
AMD_SHARED = 65536
KERNELS = ("forward", "dkdv", "dq", "dbias", "weights")
FEATURES = {  # of a row: what it is compiled with
    False: ("plain", "causal", "causal, window, lengths, sinks"),
    True: ("softcap, alibi", "bias, mask, segments", "dropout", "all"),
}
DTYPES = {16: torch.bfloat16, 32: torch.float32}


@dataclass(frozen=True)
class Entry:
    """One kernel of one row, compiled with some features."""

    arch: str
    bits: int
    head_dim: int
    kernel: str
    features: str
    tile: str

    @property
    def name(self) -> str:
        arch = self.arch if self.arch == AMD else f"sm_{self.arch}"
        return f"{arch} {self.bits}-bit D{self.head_dim} {self.kernel} [{self.features}] {self.tile}"

    @property
    def strict(self) -> bool:
        """Held to no spills: 16-bit plain and causal rows up to head dim 128."""
        return (
            self.features in FEATURES[False] and self.head_dim <= 128 and self.bits == 16 and self.arch != AMD
        )


@dataclass(frozen=True)
class Report:
    """What the compiler made of one kernel; error is set if it failed."""

    registers: int = 0
    shared: int = 0  # bytes
    stack: int = 0  # bytes per thread
    local_ops: int = 0  # loads and stores of local memory in the SASS
    wgmma: int = 0
    wide_copies: int = 0  # asynchronous copies of 16 bytes to shared memory in the PTX
    error: str = ""


def call_with(features: str, head_dim: int, bits: int) -> Any:
    """A small call with the named features."""
    from fastattn.spec import AttentionCall

    length = 16
    query = torch.empty(2, 2, length, head_dim, dtype=DTYPES[bits])
    ids = torch.zeros(2, length, dtype=torch.int32)
    groups: dict[str, dict[str, Any]] = {
        "causal": {"causal": "bottom_right"},
        "softcap": {"softcap": 1.0},
        "alibi": {"alibi_slopes": torch.ones(1, 2)},
        "bias": {"bias": torch.empty(1, 2, length, length, dtype=DTYPES[bits])},
        "mask": {"mask": torch.empty(1, 1, length, length, dtype=torch.bool)},
        "segments": {"query_segments": ids, "key_segments": ids},
        "dropout": {"dropout_p": 0.1, "dropout_seed": torch.zeros(1, dtype=torch.int64)},
        "lengths": {"key_lengths": torch.zeros(2, dtype=torch.int32)},
        "window": {"window_left": 3},
        "sinks": {"sinks": torch.ones(2)},
    }
    names = list(groups) if features == "all" else features.split(", ")
    options: dict[str, Any] = {}
    for name in names:
        options |= groups.get(name, {})
    return AttentionCall(query, query, query, **options)


def entries(
    architectures: Iterable[str],
    kernels: Iterable[str] = KERNELS,
    bits: int = 0,
    head_dims: Iterable[int] = (),
    only: Iterable[str] = (),
) -> Iterator[Entry]:
    """Every kernel of every row of some architectures, with each (or only some) of the feature sets the row serves."""
    from fastattn.kernels.tiles import TABLE

    for arch in architectures:
        for key in TABLE:
            if key.family != family(arch) or bits not in (0, key.bits):
                continue
            if head_dims and key.head_dim not in head_dims:
                continue
            row = tiles_on(arch, key)
            for kernel, features in product(kernels, FEATURES[key.rich]):
                if only and features not in only:
                    continue
                if kernel == "dbias" and "bias" not in features and features != "all":
                    continue
                tile = row.dbias if kernel == "weights" else getattr(row, kernel)
                yield Entry(arch, key.bits, key.head_dim, kernel, features, str(tile))


def family(arch: str) -> int:
    """Whose rows an architecture is compiled with."""
    from fastattn.kernels.tiles import family_of

    return 86 if arch == AMD else family_of(int(arch))


def tiles_on(arch: str, key: Any) -> Any:
    """A row of the table; without the stages of a pipeline for AMD, whose 64 KiB have no room for them."""
    from fastattn.kernels.tiles import TABLE

    row = TABLE[key]
    if arch != AMD:
        return row
    tiles = {field.name: replace(getattr(row, field.name), num_stages=1) for field in fields(row)}
    return replace(row, **tiles)


def compile_entry(entry: Entry) -> Report:
    """Compile an entry with the tile that tiles.py gives it."""
    from attention_launches import launches_of

    from fastattn.kernels.tiles import Key

    key = Key(family(entry.arch), entry.bits, entry.head_dim, entry.features in FEATURES[True])
    row = tiles_on(entry.arch, key)
    call = call_with(entry.features, entry.head_dim, entry.bits)
    try:
        return compile_launch(launches_of(call, row)[entry.kernel], entry.arch)
    except Exception as error:
        return Report(error=f"{type(error).__name__}: {str(error).splitlines()[0]}")


def target_of(arch: str) -> Any:
    """Triton's name for an architecture."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget("hip", arch, 64) if arch == AMD else GPUTarget("cuda", int(arch), 32)


def specialise(launch: Any, target: Any) -> tuple[Any, Any]:
    """The source and options that Triton's own launcher would compile for these arguments on `target`."""
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(target)
    kernel = launch.kernel
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    bound, specialization, options = binder(**launch.args, **options)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialization, options
    )
    return ASTSource(kernel, signature, constants, attributes), parsed


def compile_launch(launch: Any, arch: str | int) -> Report:
    """Compile one launch for an architecture and inspect the binary."""
    import triton

    target = target_of(str(arch))
    source, options = specialise(launch, target)
    binary = triton.compile(source, target=target, options=options.__dict__)
    return Report(shared=binary.metadata.shared) if arch == AMD else inspect_binary(binary)


def inspect_binary(binary: Any) -> Report:
    """Registers, stack, spills and wgmma of a compiled kernel, from the tools in triton's package."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", file.name)
        sass = _run(tools / "cuobjdump", "-sass", file.name)
    return Report(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        shared=binary.metadata.shared,
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        local_ops=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        wgmma=len(re.findall(r"wgmma\.mma_async", binary.asm["ptx"])),
        wide_copies=len(re.findall(r"cp\.async\.cg\.shared\.global[^;]*, 0x10", binary.asm["ptx"])),
    )


def _run(*command: Any) -> str:
    environment = {**os.environ, "PATH": f"{Path(command[0]).parent}:{os.environ.get('PATH', '')}"}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout


def problem(entry: Entry, report: Report, allowance: int | None = None) -> str | None:
    """What is wrong with an entry, if anything; spills may not grow beyond an allowance."""
    from fastattn.kernels.tiles import FAMILIES

    if report.error:
        return report.error
    limit = AMD_SHARED if entry.arch == AMD else FAMILIES[family(entry.arch)][1]
    if report.shared > limit:
        return f"{report.shared} bytes of shared memory, limit {limit}"
    if entry.strict and report.local_ops:
        return f"{report.local_ops} loads and stores of local memory, none are allowed"
    if allowance is not None and report.local_ops > allowance:
        return f"{report.local_ops} loads and stores of local memory, {allowance} are on record"
    if entry.strict and entry.arch == "90" and not report.wgmma:
        return "no wgmma"
    if entry.strict and entry.kernel in ("forward", "dkdv", "dq") and not report.wide_copies:
        return "operands are not copied 16 bytes at a time"
    return None


def recorded_spills() -> dict[str, int]:
    """Loads and stores of local memory on record, by entry, if this is the Triton they were recorded with."""
    import triton

    stored = json.loads(STORED.read_text()) if STORED.exists() else {"triton": None}
    if stored["triton"] != triton.__version__:
        return {}
    return {row["name"]: row["values"]["local_ops"] for row in stored["rows"]}


def run(chosen: list[Entry], workers: int, allowances: dict[str, int]) -> dict[Entry, Report]:
    """Compile entries in parallel, printing each as it is done."""
    reports = {}
    with ProcessPoolExecutor(workers) as pool:
        for entry, report in zip(chosen, pool.map(compile_entry, chosen)):
            reports[entry] = report
            wrong = problem(entry, report, allowances.get(entry.name))
            print(
                f"{entry.name:78} reg {report.registers:3} smem {report.shared:6} stack {report.stack:5} "
                f"local {report.local_ops:5} wgmma {report.wgmma:3}{'  <- ' + wrong if wrong else ''}",
                flush=True,
            )
    return reports


def write(reports: dict[Entry, Report]) -> None:
    """Store the table, keeping what an earlier run found for rows that are still in use and were not compiled now."""
    import triton

    rows = {entry.name: {**asdict(entry), **asdict(report)} for entry, report in reports.items()}
    if STORED.exists():
        stored = json.loads(STORED.read_text())
        current = {entry.name for entry in entries([*map(str, ARCHITECTURES), AMD])}
        if stored["triton"] == triton.__version__:
            kept = {row["name"]: row["values"] for row in stored["rows"] if row["name"] in current}
            rows = {**kept, **rows}
    listed = [{"name": name, "values": rows[name]} for name in sorted(rows)]
    STORED.write_text(json.dumps({"triton": triton.__version__, "rows": listed}, indent=1) + "\n")
    lines = [
        "# What the compiler makes of the Triton kernels",
        "",
        f"Written by `python tests/kernels/compile_matrix.py --all --write` with Triton {triton.__version__}. "
        "Registers per thread, shared memory in KiB per block, loads and stores of local memory (spills), wgmma and "
        "16-byte asynchronous copies in the code.",
        "",
        "| architecture | bits | D | kernel | features | tile | registers | shared | spills | wgmma | copies |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in listed:
        v = row["values"]
        figures = [v["registers"], round(v["shared"] / 1024), v["local_ops"], v["wgmma"], v["wide_copies"]]
        cells = [v["arch"], v["bits"], v["head_dim"], v["kernel"], v["features"], v["tile"]]
        cells += ["failed: " + v["error"]] if v["error"] else figures
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text("\n".join(lines) + "\n")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every architecture")
    parser.add_argument(
        "--arch", action="append", help="one architecture, as in 90 or gfx942; may be repeated"
    )
    parser.add_argument("--kernel", action="append", choices=KERNELS)
    parser.add_argument("--bits", type=int, default=0, choices=(16, 32))
    parser.add_argument("--head-dim", type=int, action="append")
    parser.add_argument("--features", action="append", choices=[*FEATURES[False], *FEATURES[True]])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="store the table")
    args = parser.parse_args()
    every = [*map(str, ARCHITECTURES), AMD]
    architectures = every if args.all else args.arch or ["80", "90"]
    chosen = list(
        entries(architectures, args.kernel or KERNELS, args.bits, args.head_dim or (), args.features or ())
    )
    allowances = {} if args.write else recorded_spills()
    reports = run(chosen, args.workers, allowances)
    if args.write:
        write(reports)
    wrong = [e.name for e, report in reports.items() if problem(e, report, allowances.get(e.name))]
    print(f"{len(reports)} compiled, {len(wrong)} with problems")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
