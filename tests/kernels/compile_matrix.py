"""Compiles every row of the tile tables ahead of time, without a GPU: registers, shared memory, spills and wgmma.

    python tests/kernels/compile_matrix.py --write -j 4             bring the table on file up to date
    python tests/kernels/compile_matrix.py --arch 90 --size 128 --bits 16 --kernel forward
    python tests/kernels/compile_matrix.py --stale                  list what changed since it was written

--write compiles what the table on file lacks or has from other code, tiles or another Triton, and stores
compile_table.json beside this file and docs/compile_table.md. The exit status is 1 where shared memory overflows, a
16-bit row without score features spills at all up to head dim 128 or lacks wgmma on sm_90, or a row spills more than
the table on file says (with the same Triton); --accept-spills stores such a row, which --write alone doesn't.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import product
from typing import Any

import compile_record
import torch
from compile_inspect import AMD, Report, compile_launch, intermediate

ARCHITECTURES = ("80", "86", "89", "90", "100", "120", AMD)
AMD_SHARED = 65536
ATTENTION = ("forward", "dkdv", "dkdv_split", "sum_splits", "dq", "dbias", "weights")
FEATURES = {  # of an attention row: what it is compiled with, by whether something changes its scores
    False: ("plain", "causal", "causal, window, lengths, sinks", "causal, packed"),
    True: ("softcap, alibi", "bias, mask, segments", "dropout", "all", "softcap, alibi, dropout, packed"),
}
EVERY_FEATURE = ("80", "90")  # architectures whose rows are compiled with all of those; the others with
WITHOUT = ", without TMA"  # of a row that loads by TMA: the tile for operands that TMA cannot load
FEWER = {False: ("causal",), True: ("all",)}
CACHE_ARCHITECTURES = ("80", "86", "90", "100", "120")  # one of each family of tiles
ROW_ARCHITECTURES = ("80", "90")  # their tiles are the same everywhere
WRITTEN_AT_ONCE = 24  # rows compiled before the table is stored, so that an interruption loses little
PACKED = ("forward", "dkdv", "dkdv_split", "dq")  # the kernels that packed sequences run on
GROUPED = {  # with eight query heads to a key head, where the loop over them matters: on EVERY_FEATURE
    "dkdv": ("causal, grouped", "causal, packed, grouped"),
    "dkdv_split": ("causal, grouped", "causal, packed, grouped"),
    "sum_splits": ("causal, grouped",),
}
ROW_KERNELS = ("softmax_fwd", "softmax_bwd", "cross_entropy_fwd", "cross_entropy_bwd")
CACHE_KERNELS = ("decode", "cache_append", "combine")
SPLITTING = ("dkdv_split", "sum_splits")
KERNELS = (*ATTENTION, *CACHE_KERNELS, *ROW_KERNELS)
DTYPES = {16: torch.bfloat16, 32: torch.float32}


@dataclass(frozen=True)
class Entry:
    """One kernel of one row, compiled with some features."""

    arch: str
    bits: int
    size: int  # head dim, or columns
    kernel: str
    features: str
    tile: str = field(compare=False, default="")

    @property
    def name(self) -> str:
        """What the row is called in the table on file; a row keeps its name, and its spills, when its tile changes."""
        arch = self.arch if self.arch == AMD else f"sm_{self.arch}"
        return f"{arch} {self.bits}-bit {self.size_name[0]}{self.size} {self.kernel} [{self.features}]"

    @property
    def size_name(self) -> str:
        """What `size` counts."""
        return "N, columns" if self.kernel in ROW_KERNELS else "D"

    @property
    def strict(self) -> bool:
        """Held to no spills: rows of softmax, and 16-bit attention without score features up to head dim 128. With
        grouped heads dk and dv spill what the loop over heads keeps, beside the loop over blocks: on record only."""
        if self.arch == AMD or ("grouped" in self.features and self.kernel != "sum_splits"):
            return False
        if self.kernel in ROW_KERNELS or self.kernel == "sum_splits":
            return True
        plain = self.features.removesuffix(WITHOUT) in FEATURES[False] or (
            self.kernel in CACHE_KERNELS and "all" not in self.features
        )
        return plain and self.size <= 128 and self.bits == 16

    @property
    def shared_limit(self) -> int:
        """Bytes of shared memory a block may use."""
        from fastattn.kernels.tiles import FAMILIES

        return AMD_SHARED if self.arch == AMD else FAMILIES[family(self.arch)][1]


def call_with(features: str, head_dim: int, bits: int, length: int = 16) -> Any:
    """A small call with the named features."""
    from fastattn.spec import AttentionCall

    batch = 1 if "packed" in features else 2
    query = torch.empty(batch, 8 if "grouped" in features else 2, length, head_dim, dtype=DTYPES[bits])
    key = query[:, :1] if "grouped" in features else query
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
    return AttentionCall(query, key, key, **options)


def entries(architectures: Iterable[str] = ARCHITECTURES) -> Iterator[Entry]:
    """Every kernel of every row of some architectures, with each of the feature sets the row serves."""
    for arch in architectures:
        yield from _attention_entries(arch)
        if arch in CACHE_ARCHITECTURES:
            yield from _cache_entries(arch)
        if arch in ROW_ARCHITECTURES:
            yield from _row_entries(arch)


def _attention_entries(arch: str) -> Iterator[Entry]:
    from fastattn.kernels.tiles import TABLE, WITHOUT_TMA

    for key in TABLE:
        if key.family != family(arch):
            continue
        chosen = FEATURES if arch in EVERY_FEATURE else FEWER
        for kernel, features in product(ATTENTION, (*chosen[key.has_score_mods], *_grouped(arch, key))):
            if ("grouped" in features or kernel in SPLITTING) and features not in GROUPED.get(kernel, ()):
                continue
            row = tiles_on(arch, key, features)
            if kernel == "dbias" and "bias" not in features and features != "all":
                continue
            if "packed" in features and kernel not in PACKED:
                continue
            if kernel == "weights" and features not in ("plain", "all"):
                continue
            if kernel == "sum_splits":
                yield Entry(arch, key.bits, key.head_dim, kernel, features)
                continue
            field_name = {"weights": "dbias", "dkdv_split": "dkdv"}.get(kernel, kernel)
            tile = getattr(row, field_name)
            yield Entry(arch, key.bits, key.head_dim, kernel, features, short(tile))
            if tile.tma:
                other = getattr(WITHOUT_TMA[key], field_name)
                yield Entry(arch, key.bits, key.head_dim, kernel, features + WITHOUT, short(other))


def _grouped(arch: str, key: Any) -> tuple[str, ...]:
    return GROUPED["dkdv"] if arch in EVERY_FEATURE and not key.has_score_mods else ()


def _cache_entries(arch: str) -> Iterator[Entry]:
    import decode_compile

    for bits, head_dim, kernel, features in decode_compile.entries():
        launch = _cache_launches(arch, bits, head_dim, features)[kernel]
        tile = ""
        if kernel == "decode":
            shape = f"{launch.arguments['BLOCK_M']}x{launch.arguments['BLOCK_N']}"
            tile = f"{shape} {launch.num_warps}w {launch.num_stages}s"
        yield Entry(arch, bits, head_dim, kernel, features, tile)


def _cache_launches(arch: str, bits: int, head_dim: int, features: str) -> dict[str, Any]:
    import decode_compile

    return decode_compile.launches(int(arch), bits, head_dim, features)


def _row_entries(arch: str) -> Iterator[Entry]:
    import row_compile

    for bits, columns, features in row_compile.entries():
        for name in row_compile.launches(bits, columns, features):
            tile = row_compile.tile_of(name, bits, columns, features)
            yield Entry(arch, bits, columns, name, features, short(tile))


def short(tile: Any) -> str:
    """A tile in a few characters."""
    if hasattr(tile, "block_m"):
        shape = f"{tile.block_m}x{tile.block_n} {tile.num_warps}w {tile.num_stages}s"
        shape += " TMA" if getattr(tile, "tma", False) else ""
        shape += " tf32x3" if getattr(tile, "tf32x3", False) else ""
        registers = getattr(tile, "max_registers", None)
        return shape + (f" {registers}r" if registers else "")
    return f"{tile.rows}x{tile.columns} {tile.num_warps}w" + ("" if tile.whole else " in chunks")


def family(arch: str) -> int:
    """Whose rows an architecture is compiled with."""
    from fastattn.kernels.tiles import family_of

    return 86 if arch == AMD else family_of(int(arch))


def tiles_on(arch: str, key: Any, features: str) -> Any:
    """A row of the table; without the stages of a pipeline for AMD, whose 64 KiB have no room for them."""
    from fastattn.kernels.tiles import READ_BY_SCORE, row_of

    row = row_of(key, features == "all" or any(name in features for name in READ_BY_SCORE))
    if arch != AMD:
        return row
    tiles = {each.name: replace(getattr(row, each.name), num_stages=1) for each in fields(row)}
    return replace(row, **tiles)


@cache
def _attention_launches(row: Any, bits: int, head_dim: int, features: str) -> dict[str, Any]:
    from attention_launches import launches_of

    from fastattn.kernels.launches import Packing

    cu_seqlens = torch.zeros(3, dtype=torch.int32)
    packing = Packing(cu_seqlens, cu_seqlens) if "packed" in features else None
    return launches_of(call_with(features, head_dim, bits), row, packing)


def launch_of(entry: Entry) -> Any:
    """The launch that is compiled for an entry, with the tile that the tables give it."""
    if entry.kernel in ROW_KERNELS:
        import row_compile

        return row_compile.launches(entry.bits, entry.size, entry.features)[entry.kernel]
    if entry.kernel in CACHE_KERNELS:
        return _cache_launches(entry.arch, entry.bits, entry.size, entry.features)[entry.kernel]
    from fastattn.kernels.tiles import WITHOUT_TMA, Key

    features = entry.features.removesuffix(WITHOUT)
    key = Key(family(entry.arch), entry.bits, entry.size, features in FEATURES[True])
    row = tiles_on(entry.arch, key, features) if features == entry.features else WITHOUT_TMA[key]
    launches = _attention_launches(row, entry.bits, entry.size, features)
    return launches[entry.kernel]


def key_of(entry: Entry) -> str:
    """What the compiler would be given for an entry now."""
    return compile_record.row_key(launch_of(entry), entry.arch)


def stale(chosen: Iterable[Entry], table: dict[str, Any]) -> list[Entry]:
    """The entries that a table on file lacks, or has from other code or tiles."""
    return [entry for entry in chosen if table["rows"].get(entry.name, {}).get("key") != key_of(entry)]


@dataclass(frozen=True)
class Made:
    """What came out of an entry, and the hash of the code it came from."""

    report: Report
    ir: str = ""
    compiled: bool = True  # or else the code is that of the row on file


def make_entry(entry: Entry, row: dict[str, Any] | None = None) -> Made:
    """Compile an entry, unless the row on file came from the same code."""
    try:
        launch = launch_of(entry)
        ir = intermediate(launch, entry.arch)
        if row is not None and row.get("ir") == ir:
            return Made(compile_record.report_of(row), ir, compiled=False)
        return Made(compile_launch(launch, entry.arch), ir)
    except Exception as error:
        return Made(Report(error=f"{type(error).__name__}: {str(error).splitlines()[0]}"))


def problem(entry: Entry, report: Report, allowance: int | None = None) -> str | None:
    """What is wrong with an entry, if anything; spills may not grow beyond an allowance."""
    if report.error:
        return report.error
    if report.shared > entry.shared_limit:
        return f"{report.shared} bytes of shared memory, limit {entry.shared_limit}"
    if entry.strict and report.local_ops:
        return f"{report.local_ops} loads and stores of local memory, none are allowed"
    if allowance is not None and report.local_ops > allowance:
        return f"{report.local_ops} loads and stores of local memory, {allowance} are on record"
    if not entry.strict or entry.kernel in ROW_KERNELS:
        return None
    if (
        entry.kernel in ATTENTION
        and entry.arch == "90"
        and entry.kernel != "sum_splits"
        and not report.async_mma
    ):
        return "no wgmma"
    if entry.kernel in ("forward", "dkdv", "dq", "decode") and not (report.wide_copies or report.tma_copies):
        return "operands are neither copied 16 bytes at a time nor by TMA"
    return None


def allowances(table: dict[str, Any]) -> dict[str, int]:
    """Loads and stores of local memory on record, by entry, if this is the Triton they were recorded with."""
    import triton

    if table["triton"] != triton.__version__:
        return {}
    return {name: row.get("local_ops", 0) for name, row in table["rows"].items()}


def run(
    chosen: list[Entry], pool: ProcessPoolExecutor, allowed: dict[str, int], rows: dict[str, Any]
) -> dict[Entry, Made]:
    """Make entries in parallel, printing each as it is done; `rows` on file spare what came from the same code."""
    made = {}
    known = [rows.get(entry.name) for entry in chosen]
    for entry, each in zip(chosen, pool.map(make_entry, chosen, known)):
        made[entry] = each
        report, wrong = each.report, problem(entry, each.report, allowed.get(entry.name))
        print(
            f"{entry.name:66} {entry.tile:18} reg {report.registers:3} smem {report.shared:6} "
            f"local {report.local_ops:4} mma {report.async_mma:3}{'' if each.compiled else '  same code'}"
            f"{'  <- ' + wrong if wrong else ''}",
            flush=True,
        )
    return made


def write(table: dict[str, Any], made: dict[Entry, Made], wrong: set[Entry]) -> None:
    """Store the table: what was made, but for what is wrong, and what is on file of rows still in use."""
    import triton

    current = list(entries())
    rows = {}
    if table["triton"] == triton.__version__:
        rows = {entry.name: table["rows"][entry.name] for entry in current if entry.name in table["rows"]}
    for entry, each in made.items():
        if entry not in wrong:
            rows[entry.name] = compile_record.row_of(key_of(entry), each.ir, each.report)
    compile_record.store(triton.__version__, rows, current)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    args = _parser().parse_args(arguments)
    import triton

    table = compile_record.load()
    chosen = [entry for entry in entries(args.arch or ARCHITECTURES) if _wanted(entry, args)]
    if (args.write or args.stale) and table["triton"] == triton.__version__:
        chosen = stale(chosen, table)
    if args.stale:
        print("\n".join([entry.name for entry in chosen] + [f"{len(chosen)} rows are stale"]))
        return 1 if chosen else 0
    allowed = {} if args.accept_spills else allowances(table)
    known = table["rows"] if args.write and table["triton"] == triton.__version__ else {}
    size = WRITTEN_AT_ONCE if args.write else max(len(chosen), 1)
    wrong: set[Entry] = set()
    with ProcessPoolExecutor(args.jobs) as pool:
        for start in range(0, len(chosen), size):
            made = run(chosen[start : start + size], pool, allowed, known)
            found = {e for e, each in made.items() if problem(e, each.report, allowed.get(e.name))}
            wrong |= found
            if args.write:
                write(compile_record.load(), made, found)
    if args.write and not chosen:
        write(table, {}, set())
    print(f"{len(chosen)} compiled, {len(wrong)} with problems")
    return 1 if wrong else 0


def _wanted(entry: Entry, args: argparse.Namespace) -> bool:
    return (
        entry.kernel in (args.kernel or KERNELS)
        and entry.bits in (args.bits or DTYPES)
        and entry.size in (args.size or [entry.size])
        and entry.features in (args.features or [entry.features])
        and (entry.strict or not args.strict)
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--arch",
        action="append",
        choices=ARCHITECTURES,
        help="one architecture; may be repeated, as may the rest",
    )
    add("--kernel", action="append", choices=KERNELS)
    add("--bits", type=int, action="append", choices=(16, 32))
    add("--size", type=int, action="append", help="head dim, or columns")
    add("--features", action="append", help="as the table names them")
    add("--strict", action="store_true", help="only rows that must not spill, whichever Triton compiles them")
    add("-j", "--jobs", type=int, default=2, help="processes that compile")
    add("--write", action="store_true", help="compile what is stale and store the table")
    add("--accept-spills", action="store_true", help="with --write: let spills on record grow")
    add("--stale", action="store_true", help="list what --write would compile, compiling nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
