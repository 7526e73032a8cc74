"""The command line every bench shares: choose cases, measure, print, store."""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import checkout
import figures
import harness
import memory
import schema
import torch
from harness import Budget, Case

# All CPU cases of all benches, on two cores, take about 12 minutes at such budgets.
CASE_BUDGET = Budget(seconds=2.0)
ExtraCase = Callable[[bool], schema.Result]  # given whether the run is quick


def main(
    bench: str,
    script: Path,
    cases_for: Callable[[torch.device], Sequence[Case]],
    extras: dict[str, ExtraCase] | None = None,
    argv: Sequence[str] | None = None,
    budget: Budget = CASE_BUDGET,
) -> int:
    """Run the bench's chosen cases; 1 if a contestant of ours failed, or broke the error rule as no peer did.

    `budget` is how long a case is measured unless the options say otherwise.
    """
    options = _parser(bench).parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    checkout.make_importable()
    checkout.correct_interpreter()
    device = torch.device(options.device)
    cases = list(cases_for(torch.device(options.cases_of or options.device)))
    if options.warm_cases:
        warm_cases([case for case in cases if case.name in options.warm_cases], device, options.contestants)
        return 0
    if options.measure_memory:
        name, *contestants = options.measure_memory
        memory.print_peaks(next(case for case in cases if case.name == name), contestants)
        return 0
    chosen = [case for case in cases if _matches(options.only, case.name, case.group)]
    with_extras = device.type == "cpu" and options.cases_of != "cuda"
    chosen_extras = {n: e for n, e in (extras or {}).items() if with_extras and _matches(options.only, n, n)}
    if options.list:
        print("\n".join([f"{case.name:<34} {case.group}" for case in chosen] + list(chosen_extras)))
        return 0
    if not chosen and not chosen_extras:
        print(f"no case matches {' '.join(options.only)}; --list shows them", file=sys.stderr)
        return 2
    if options.warm:
        warm(script, [case.name for case in chosen], options)
    result = _start(bench, device, options, _dtypes(chosen))
    path = _json_path(bench, result, options)
    problems: list[str] = []
    for extra in chosen_extras.values():
        problems += _add(result, extra(options.quick), path, options.merge)
    for case in chosen:
        problems += _run(case, device, options, budget, result, path, script)
    _raise_ceilings(result, harness.measure_ceilings(device, _dtypes(chosen), options.quick))
    if path is not None:
        schema.save(_merged(result, path) if options.merge else result, path)
    _write_outputs(bench, result, path, options)
    if problems:
        print(f"{len(problems)} wrong: " + "; ".join(problems))
    return 1 if problems else 0


def _dtypes(cases: Sequence[Case]) -> list[torch.dtype]:
    return list(dict.fromkeys(case.dtype for case in cases))


def _raise_ceilings(result: schema.Result, again: schema.Result) -> None:
    """A ceiling is the better of two measurements, before and after the cases: other programs disturb either."""
    first = result["ceilings"]
    rates = {name: max(rate, again["matmul_tflops"][name]) for name, rate in first["matmul_tflops"].items()}
    result["ceilings"] = {"matmul_tflops": rates, "copy_gbps": max(first["copy_gbps"], again["copy_gbps"])}
    for case in result["cases"]:
        for row in case["rows"]:
            if row.get("ceiling_share") is None:
                continue
            if row.get("gbps"):
                row["ceiling_share"] = round(row["gbps"] / result["ceilings"]["copy_gbps"], 4)
            else:
                row["ceiling_share"] = round(row["tflops"] / rates[case["dtype"]], 4)


def warm(script: Path, names: list[str], options: argparse.Namespace) -> None:
    """Let processes compile what the cases need, side by side, into the compilers' caches on disk."""
    command = [sys.executable, str(script), "--device", options.device]
    command += ["--cases-of", options.cases_of] if options.cases_of else []
    command += ["--contestants", options.contestants] if options.contestants else []
    shares = [names[start :: options.warm] for start in range(min(options.warm, len(names)))]
    null = subprocess.DEVNULL
    workers = [
        subprocess.Popen([*command, "--warm-cases", *share], stdout=null, stderr=null) for share in shares
    ]
    for worker in workers:
        worker.wait()


def warm_cases(cases: Sequence[Case], device: torch.device, only: str | None) -> None:
    """A worker's side of `warm`: one step of every contestant that compiles.

    Our kernels serve all lengths, so the small form will do; what torch compiles is compiled for one shape.
    """
    for case in cases:
        for contestant in case.contestants(device):
            if not re.search("fastattn|flex|compile", contestant) or (
                only and not re.search(only, contestant)
            ):
                continue
            form = case if re.search("flex|compile", contestant) else case.small()
            with contextlib.suppress(Exception):  # the measured run gives the reason
                form.open(device).step(contestant)()


def _run(
    case: Case,
    device: torch.device,
    options: argparse.Namespace,
    budget: Budget,
    result: schema.Result,
    path: Path | None,
    script: Path,
) -> list[str]:
    if options.quick:
        case = case.small()
        budget = harness.QUICK
    memory_wanted = budget.memory and not options.no_memory
    budget = replace(budget, memory=memory_wanted, errors=not options.no_errors)
    if options.seconds:
        budget = replace(budget, seconds=options.seconds)
    memory_script = None if options.quick else script
    entry = harness.run_case(case, device, budget, result["ceilings"], memory_script, options.contestants)
    return _add(result, entry, path, options.merge)


def _add(result: schema.Result, entry: schema.Result, path: Path | None, merging: bool) -> list[str]:
    """Keep the entry, store what there is so far, print it; what is wrong with our rows."""
    result["cases"].append(entry)
    if path is not None:
        schema.save(_merged(result, path) if merging else result, path)
    print("\n".join(figures.case_lines(entry)), flush=True)
    ours = [row for row in entry["rows"] if row["contestant"].startswith("fastattn")]
    peers = [row for row in entry["rows"] if row not in ours and row.get("error")]
    greatest = max((max(row["error"].values()) for row in peers), default=0.0)
    problems = [
        f"{entry['name']}, {row['contestant']}: {row['reason']}" for row in ours if row["status"] == "failed"
    ]
    for row in ours:
        if row.get("within_rule") is False and max(row["error"].values()) > greatest:
            problems.append(f"{entry['name']}, {row['contestant']}: error over the rule")
    return problems


def _merged(result: schema.Result, path: Path) -> schema.Result:
    return schema.merge(schema.load(path), result) if path.exists() else result


def _start(
    bench: str, device: torch.device, options: argparse.Namespace, dtypes: list[torch.dtype]
) -> schema.Result:
    settings = {"quick": options.quick, "only": options.only, "contestants": options.contestants}
    settings["omp_wait_policy"] = os.environ.get("OMP_WAIT_POLICY")
    result = schema.new_result(bench, device, settings)
    if options.revision:
        result["revision"] = options.revision
    result["ceilings"] = harness.measure_ceilings(device, dtypes, options.quick)
    rates = ", ".join(f"{name} {rate} TFLOP/s" for name, rate in result["ceilings"]["matmul_tflops"].items())
    print(
        f"{result['device']['name']}, {result['device']['threads']} threads, torch {result['versions']['torch']}"
    )
    print(f"ceilings: matmul {rates}; copy {result['ceilings']['copy_gbps']} GB/s", flush=True)
    return result


def _json_path(bench: str, result: schema.Result, options: argparse.Namespace) -> Path | None:
    if options.json:
        return destination(options.json, bench, ".json")
    partial = options.quick or options.only or options.contestants or options.no_memory or options.no_errors
    return None if partial else schema.RESULTS / schema.folder_name(result["device"]) / f"{bench}.json"


def destination(text: str, bench: str, suffix: str) -> Path:
    """The file that an option names, or the bench's own in the folder that it names."""
    path = Path(text)
    return path if path.suffix == suffix else path / f"{bench}{suffix}"


def _write_outputs(bench: str, result: schema.Result, path: Path | None, options: argparse.Namespace) -> None:
    stored = schema.load(path) if path is not None else result
    if path is not None:
        print(f"stored {path}")
    if options.csv:
        table = destination(options.csv, bench, ".csv")
        write_csv(stored, table)
        print(f"stored {table}")
    if options.plot:
        import plot

        for chart in plot.draw(stored, Path(options.plot)):
            print(f"stored {chart}")


def write_csv(result: schema.Result, path: Path) -> None:
    """One line per contestant and case."""
    names = [
        "case",
        "group",
        "direction",
        "dtype",
        "contestant",
        "status",
        "reason",
        "median_ms",
        "p20_ms",
        "p80_ms",
    ]
    names += [
        "tflops",
        "gbps",
        "ceiling_share",
        "host_ms",
        "peak_memory_mib",
        "greatest_error",
        "within_rule",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, names, extrasaction="ignore")
        table.writeheader()
        for case in result["cases"]:
            for row in case["rows"]:
                time = row.get("time_ms", {})
                line = {
                    "case": case["name"],
                    **case,
                    **row,
                    "greatest_error": max((row.get("error") or {"": None}).values()),
                }
                table.writerow(
                    {**line, **{f"{name}_ms": time.get(name) for name in ("median", "p20", "p80")}}
                )


def unusual(dtype: torch.dtype, direction: str) -> list[str]:
    """What a label adds: a dtype other than float32, a direction other than forward and backward."""
    words = [] if dtype == torch.float32 else [harness.dtype_name(dtype)]
    return words if direction == "forward+backward" else [*words, direction]


def _matches(patterns: Sequence[str], *names: str) -> bool:
    return not patterns or any(re.search(pattern, name) for pattern in patterns for name in names)


def _parser(bench: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"fastattn bench {bench}", description=f"Measure {bench} beside its peers on this machine."
    )
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--cases-of", choices=("cpu", "cuda"), help="the cases made for this device, whichever runs them")
    add(
        "--only",
        nargs="+",
        default=[],
        metavar="REGEX",
        help="cases whose name or group matches one of these",
    )
    add("--contestants", metavar="REGEX", help="only contestants whose name matches")
    add("--quick", action="store_true", help="small sizes, few rounds, no memory: shows that everything runs")
    add("--seconds", type=float, help="measuring time per case")
    add("--threads", type=int, help="CPU threads (default: torch's)")
    add(
        "--json",
        "--out",
        metavar="PATH",
        help="a .json file, or a folder for the bench's own (default for a full run: the results folder)",
    )
    add("--merge", action="store_true", help="keep the file's other cases")
    add("--csv", metavar="PATH", help="also as a table, one line per contestant: a .csv file or a folder")
    add("--plot", metavar="FOLDER", help="also as charts (needs matplotlib)")
    add("--list", action="store_true", help="show the chosen cases and stop")
    add("--no-memory", action="store_true", help="skip the peak memory")
    add("--no-errors", action="store_true", help="skip the comparison with float64")
    add("--revision", help="commit to record where the checkout has no git folder")
    add("--warm", type=int, metavar="N", help="first compile what is needed, in N processes")
    add("--warm-cases", nargs="+", default=[], help=argparse.SUPPRESS)
    add("--measure-memory", nargs="+", help=argparse.SUPPRESS)  # a case, then contestants
    return parser
