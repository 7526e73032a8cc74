"""The command line every bench shares: choose cases, measure, print, store."""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

import checkout
from measure import harness, memory, processes
from measure.harness import Budget
from measure.options import check_merge, destination, parse
from measure.protocols import Case
from report import figures, schema

# All CPU cases of all benches, on two cores, take about 12 minutes at such budgets.
CASE_BUDGET = Budget(seconds=2.0)
WARM_SECONDS = 90.0
ExtraCase = Callable[[bool], schema.Result]  # given whether the run is quick


def main(
    bench: str,
    script: Path,
    cases_for: Callable[[torch.device], Sequence[Case]],
    extras: Mapping[str, ExtraCase] | None = None,
    argv: Sequence[str] | None = None,
    budget: Budget = CASE_BUDGET,
) -> int:
    """Run the chosen cases; 1 if a provider of ours failed, or broke the error rule where no peer did.

    `budget` is how long a case is measured unless the options say otherwise.
    """
    options = parse(bench, argv)
    if not options.json:
        return _run_bench(bench, script, cases_for, extras or {}, options, budget)[0]
    with contextlib.redirect_stdout(sys.stderr):
        status, shown = _run_bench(bench, script, cases_for, extras or {}, options, budget)
    if shown is not None:
        print(json.dumps(shown, indent=1, ensure_ascii=False))
    return status


def _run_bench(
    bench: str,
    script: Path,
    cases_for: Callable[[torch.device], Sequence[Case]],
    extras: Mapping[str, ExtraCase],
    options: argparse.Namespace,
    budget: Budget,
) -> tuple[int, schema.Result | None]:
    """The exit status, and what --json prints: the result, or the list of cases."""
    if options.threads:
        torch.set_num_threads(options.threads)
    checkout.make_importable()
    checkout.correct_interpreter()
    device = torch.device(options.device)
    cases = list(cases_for(torch.device(options.cases_of or options.device)))
    if options.warm_cases:
        warm_cases([case for case in cases if case.name in options.warm_cases], device, options.providers)
        return 0, None
    if options.measure_memory:
        name, *providers = options.measure_memory
        memory.print_peaks(next(case for case in cases if case.name == name), providers)
        return 0, None
    chosen = [case for case in cases if _matches(options.only, case.name, case.group)]
    with_extras = device.type == "cpu" and options.cases_of != "cuda"
    chosen_extras = {n: e for n, e in extras.items() if with_extras and _matches(options.only, n, n)}
    if options.list:
        print("\n".join([f"{case.name:<34} {case.group}" for case in chosen] + list(chosen_extras)))
        listed = [{"name": case.name, "group": case.group, "label": case.label} for case in chosen]
        return 0, {"bench": bench, "cases": listed + [{"name": name} for name in chosen_extras]}
    if not chosen and not chosen_extras:
        print(f"no case matches {' '.join(options.only)}; --list shows them", file=sys.stderr)
        return 2, None
    result = _new_result(bench, device, options)
    path = _json_path(bench, result, options)
    try:
        if options.merge and path is None:
            raise ValueError("this run stores nothing, needs --out PATH")
        if options.merge and path is not None:
            check_merge(result, path)
    except ValueError as error:
        print(f"fastattn bench {bench}: --merge: {error}", file=sys.stderr)
        return 2, None
    if options.warm:
        compiled = [case for case in chosen if compiled_providers(case, device, options.providers)]
        if compiled:
            warm(script, [case.name for case in compiled], options)
    _measure_ceilings(result, device, options, _dtypes(chosen))
    problems: list[str] = []
    for extra in chosen_extras.values():
        problems += _add(result, extra(options.quick), path, options.merge)
    for case in distinct_small_forms(chosen) if options.quick else chosen:
        problems += _run(case, device, options, budget, result, path, script)
    _raise_ceilings(result, harness.measure_ceilings(device, _dtypes(chosen), options.quick))
    if path is not None:
        schema.save(_merged(result, path) if options.merge else result, path)
    if not options.quick and (median := figures.median_line(result)):
        print(median)
    _write_outputs(bench, result, path, options)
    if problems:
        print(f"{len(problems)} wrong: " + "; ".join(problems))
    return 1 if problems else 0, result


@dataclass(frozen=True)
class SmallForm:
    """A case at the size that a quick run measures, with that size in its name."""

    case: Case
    name: str
    full_name: str  # the name of the case at its full size

    def __getattr__(self, name: str) -> Any:
        return getattr(self.case, name)


def distinct_small_forms(cases: Sequence[Case]) -> list[SmallForm]:
    """The cases of a quick run: the small form of each case, once where several have the same."""
    forms: dict[str, SmallForm] = {}
    for case in cases:
        small = case.small()
        name = small_name(case, small)
        same = forms.get(name)
        if same is not None and small.label == same.label and small.params == same.params:
            continue
        number = 2
        while name in forms:
            name, number = f"{small_name(case, small)}-{number}", number + 1
        forms[name] = SmallForm(small, name, case.name)
    return list(forms.values())


def small_name(case: Case, small: Case) -> str:
    """The case's name with the sizes of its small form."""
    sizes: dict[str, str] = {}
    for before, after in zip(_numbers(case.params), _numbers(small.params)):
        sizes.setdefault(str(before), str(after))
    return re.sub(r"\d+", lambda match: sizes.get(match.group(), match.group()), case.name)


def _numbers(params: schema.Result) -> list[int]:
    """The sizes of a case; those that names usually contain come first."""
    found: list[int] = []
    for key in sorted(params, key=lambda name: (name in ("batch", "heads", "kv_heads", "head_dim"), name)):
        value = params[key]
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(each, int) and not isinstance(each, bool):
                found.append(each)
    return found


def _dtypes(cases: Sequence[Case]) -> list[torch.dtype]:
    return list(dict.fromkeys(case.dtype for case in cases))


def _raise_ceilings(result: schema.Result, again: schema.Result) -> None:
    """Keep the higher of two measurements of each ceiling, before and after the cases."""
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
    """Let processes compile what torch compiles for the cases, side by side, into its cache on disk.

    Each process is stopped after WARM_SECONDS; the measured process compiles the rest.
    """
    command = [sys.executable, str(script), "--device", options.device]
    command += ["--cases-of", options.cases_of] if options.cases_of else []
    command += ["--providers", options.providers] if options.providers else []
    shares = [names[start :: options.warm] for start in range(min(options.warm, len(names)))]
    events: processes.Events = SimpleQueue()
    workers = [
        processes.Process([*command, "--warm-cases", *share], limit=WARM_SECONDS, events=events)
        for share in shares
    ]
    for worker, event in processes.follow(*workers):
        if isinstance(event, processes.Ended) and event.why:
            print(f"warming, process {workers.index(worker)}: {event.why}", file=sys.stderr)


def warm_cases(cases: Sequence[Case], device: torch.device, only: str | None) -> None:
    """A worker's side of `warm`: one step of every provider that torch compiles, for one shape each.

    Our kernels serve all lengths: the first case of the measured run compiles them for the others.
    """
    for case in cases:
        for provider in compiled_providers(case, device, only):
            with contextlib.suppress(Exception):  # the measured run gives the reason
                case.open(device).step(provider)()


def compiled_providers(case: Case, device: torch.device, only: str | None) -> list[str]:
    """The chosen providers that torch.compile compiles again for every shape."""
    names = [name for name in case.providers(device) if re.search("flex|compile", name)]
    return [name for name in names if only is None or re.search(only, name)]


def _run(
    case: Any,  # a Case, or its SmallForm
    device: torch.device,
    options: argparse.Namespace,
    budget: Budget,
    result: schema.Result,
    path: Path | None,
    script: Path,
) -> list[str]:
    if options.quick:
        budget = harness.QUICK
    memory_wanted = budget.memory and not options.no_memory
    budget = replace(budget, memory=memory_wanted, errors=not options.no_errors)
    if options.seconds:
        budget = replace(budget, seconds=options.seconds)
    elif case.target is not None:  # no small form has one
        budget = harness.for_target(budget)
    memory_script = None if options.quick else script
    entry = harness.run_case(case, device, budget, result["ceilings"], memory_script, options.providers)
    if isinstance(case, SmallForm) and case.full_name != case.name:
        entry["small_form_of"] = case.full_name
    return _add(result, entry, path, options.merge)


def _add(result: schema.Result, entry: schema.Result, path: Path | None, merging: bool) -> list[str]:
    """Add the entry, store the result so far and print the entry; returns the problems of our rows."""
    result["cases"].append(entry)
    if path is not None:
        schema.save(_merged(result, path) if merging else result, path)
    print("\n".join(figures.case_lines(entry)), flush=True)
    ours = [row for row in entry["rows"] if row["provider"].startswith("fastattn")]
    peers = [row for row in entry["rows"] if row not in ours and row.get("error")]
    greatest = max((max(row["error"].values()) for row in peers), default=0.0)
    problems = [
        f"{entry['name']}, {row['provider']}: {row['reason']}" for row in ours if row["status"] == "failed"
    ]
    for row in ours:
        if row.get("within_rule") is False and max(row["error"].values()) > greatest:
            problems.append(f"{entry['name']}, {row['provider']}: error over the rule")
    return problems


def _merged(result: schema.Result, path: Path) -> schema.Result:
    return schema.merge(schema.load(path), result) if path.exists() else result


def _new_result(bench: str, device: torch.device, options: argparse.Namespace) -> schema.Result:
    settings = {
        "quick": options.quick,
        "only": [schema.without_paths(pattern) for pattern in options.only],
        "providers": options.providers and schema.without_paths(options.providers),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }
    result = schema.new_result(bench, device, settings)
    if options.revision:
        result["revision"] = options.revision
    return result


def _measure_ceilings(
    result: schema.Result, device: torch.device, options: argparse.Namespace, dtypes: list[torch.dtype]
) -> None:
    result["ceilings"] = harness.measure_ceilings(device, dtypes, options.quick)
    rates = ", ".join(f"{name} {rate} TFLOP/s" for name, rate in result["ceilings"]["matmul_tflops"].items())
    print(
        f"{result['device']['name']}, {result['device']['threads']} threads, torch {result['versions']['torch']}"
    )
    print(f"ceilings: matmul {rates}; copy {result['ceilings']['copy_gbps']} GB/s", flush=True)


def _json_path(bench: str, result: schema.Result, options: argparse.Namespace) -> Path | None:
    if options.out:
        return destination(options.out, bench, ".json")
    partial = options.quick or options.only or options.providers or options.no_memory or options.no_errors
    return None if partial else schema.RESULTS / schema.folder_name(result["device"]) / f"{bench}.json"


def _write_outputs(bench: str, result: schema.Result, path: Path | None, options: argparse.Namespace) -> None:
    stored = schema.load(path) if path is not None else result
    if path is not None:
        print(f"stored {path}")
    if options.csv:
        table = destination(options.csv, bench, ".csv")
        write_csv(stored, table)
        print(f"stored {table}")
    if options.plot:
        from report import charts

        for chart in charts.draw(stored, Path(options.plot)):
            print(f"stored {chart}")


def write_csv(result: schema.Result, path: Path) -> None:
    """One line per provider and case."""
    names = [
        "case",
        "group",
        "direction",
        "dtype",
        "provider",
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
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, names, extrasaction="ignore")
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
            table.writerow({**line, **{f"{name}_ms": time.get(name) for name in ("median", "p20", "p80")}})
    schema.replace_file(path, text.getvalue())


def _matches(patterns: Sequence[str], *names: str) -> bool:
    return not patterns or any(re.search(pattern, name) for pattern in patterns for name in names)
