"""`fastattn bench tune`: the fastest tiles of the Triton kernels on this GPU."""

from __future__ import annotations

from typing import Annotated

import typer

from fastattn.cli.command import JsonFlag, output, print_json
from fastattn.console import InputError

MAX_JOBS, MAX_ARCH = 1024, 999


def tune(
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="float16, bfloat16 or float32; this and the next may be repeated."),
    ] = None,
    head_dim: Annotated[
        list[str] | None, typer.Option(help="Such as 64, or 192,128 for another one of values.")
    ] = None,
    features: Annotated[
        list[str] | None, typer.Option(help="Kinds of calls: plain, or features as in causal+window.")
    ] = None,
    kernel: Annotated[
        list[str] | None, typer.Option(help="forward, dkdv, dq or dbias; by default all.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer calls, and only neighbours of built-in tiles.")
    ] = False,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Start no further candidate after this time.")
    ] = None,
    jobs: Annotated[
        int, typer.Option("-j", "--jobs", min=1, max=MAX_JOBS, help="Processes that compile and check.")
    ] = 4,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the candidates; needs no GPU.")] = False,
    arch: Annotated[
        int | None,
        typer.Option(
            min=80,
            max=MAX_ARCH,
            help="For --dry-run: 10 times a compute capability; by default this GPU's, or 90.",
        ),
    ] = None,
    model: Annotated[
        bool,
        typer.Option(
            "--model", help="Rank the candidates by the cycle model of sm_90; needs no GPU, measures nothing."
        ),
    ] = False,
    store: Annotated[
        bool,
        typer.Option(
            "--store", help="With --model: store the first of each ranking, until measured tiles replace it."
        ),
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(help="With --store: the device's name, as torch gives it; by default the GPU here."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Find the fastest tiles of the Triton attention kernels on this GPU; later calls use them.

    Every candidate is compared with a float64 reference; the correct ones are timed in interleaved rounds. Winners are
    stored in the cache folder (FASTATTN_CACHE_DIR), for this device, these versions and these kernels only. Exits with
    1 if no tile was correct, with 2 without a GPU unless --dry-run or --model is given.
    """
    from fastattn.tune import command as tuning

    options = tuning.Options.of(dtype, head_dim, features, kernel, quick, minutes, jobs)
    out = output(as_json)
    if arch is not None and not dry_run:
        raise InputError(
            "--arch: is only used with --dry-run, because tiles are measured on the GPU of this machine"
        )
    if model and dry_run:
        raise InputError("--model and --dry-run: needs one of them")
    if store and not model:
        raise InputError("--store: is only used with --model, because measured tiles are always stored")
    if device is not None and not store:
        raise InputError(
            "--device: is only used with --store, because tiles are measured on the GPU of this machine"
        )
    if model:
        from fastattn.tune.model import machine_of, rank_works

        report = rank_works(options.works(), quick, out, machine_of(device) if store else None)
    else:
        report = tuning.list_candidates(options, arch, out) if dry_run else tuning.tune_here(options, out)
    if as_json:
        print_json(report)
    if report.get("failed"):
        raise typer.Exit(1)
