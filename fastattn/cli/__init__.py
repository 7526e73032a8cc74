"""The fastattn command: what the machine offers, and a demonstration of the library on it."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fastattn import bench as benches
from fastattn.cache import cache_dir
from fastattn.console import InputError, NoOutput, Output, standard_output

BAD_INPUT, INTERRUPTED = 2, 130
MAX_SEED, MAX_STEPS, MAX_JOBS, MAX_ARCH = 2**63 - 1, 10**9, 1024, 999

app = typer.Typer(
    name="fastattn",
    help="One attention call, every mask, every device: see what runs here and try it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """The console script."""
    app()


def command(function: Callable[..., None], group: typer.Typer = app, **settings: Any) -> Callable[..., None]:
    """Register a command whose user sees one line for bad input (exit code 2), a full disk or Ctrl-C (130)."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except InputError as error:
            raise _stop(str(error), BAD_INPUT) from None
        except BrokenPipeError:
            os.dup2(
                os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
            )  # the reader left: nothing to flush to
            raise typer.Exit(1) from None
        except OSError as error:
            raise _stop(str(error), 1) from None
        except KeyboardInterrupt:
            raise _stop("interrupted", INTERRUPTED) from None

    return group.command(**settings)(guarded)


def _stop(message: str, code: int) -> typer.Exit:
    typer.echo(f"fastattn: {message}", err=True)
    return typer.Exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        from fastattn import __version__

        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def _output(as_json: bool) -> Output:
    return NoOutput() if as_json else standard_output()


@command
def doctor(as_json: JsonFlag = False) -> None:
    """Report versions, devices, compilers, the extension and which backends can run here, and why others cannot."""
    from fastattn import doctor as probes

    found = probes.report()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        probes.show(found, standard_output())


@command
def demo(
    text: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text to train on; by default the standard library's own documentation."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="New or empty directory for the results; by default the first free ./fastattn-demo*."
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Seed of the data order, the weights and the sample.")
    ] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, max=MAX_STEPS, help="Training steps, instead of the preset's.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A smaller grid and a shorter training run.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Check attention against a float64 reference, time it, swap it into a torch model and train a small GPT.

    Exits with 0 when everything agreed, 1 when something did not, 2 on bad input.
    """
    from fastattn import demo as demonstration

    summary = demonstration.run(text, out, seed=seed, steps=steps, quick=quick, output=_output(as_json))
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
    if not summary["passed"]:
        raise typer.Exit(1)


@command
def build(
    arch: Annotated[
        str | None,
        typer.Option(
            help="GPU architectures, such as '8.0;9.0a'; by default TORCH_CUDA_ARCH_LIST or the GPUs here."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Compile again what is in the cache.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Build the CUDA extension for this torch into the cache, from which fastattn loads it.

    Needs a CUDA build of torch, a CUDA toolkit of the same major version, g++ and some minutes. FASTATTN_CACHE_DIR
    says where the cache is, MAX_JOBS how many compilers run at once. Exits with 1 when there is no result.
    """
    from fastattn import build as builder
    from fastattn import extension

    try:
        made = builder.build_here(cache_dir(), arch, force, log=lambda line: _output(as_json).line(line))
    except builder.BuildError as error:
        raise _stop(str(error), 1) from None
    found = extension.state()
    loads = found.path is not None and found.path.name == made.library.name
    if as_json:
        typer.echo(json.dumps(made.to_dict() | {"loads": loads, "reason": found.reason}, indent=2))
    elif loads:
        typer.echo(f"built {made.library}")
    if not loads:
        raise _stop(f"built {made.library}, but {found.reason}", 1)


bench = typer.Typer(
    help="Measure fastattn beside its peers on this machine: time, error against float64, peak memory.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(bench, name="bench")


def _bench_command(name: str, summary: str) -> None:
    """`fastattn bench NAME`, whose options, --help among them, are the script's own."""

    def measure(context: typer.Context) -> None:
        status = benches.run(name, context.args)
        if status:
            raise typer.Exit(status)

    passing = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    command(measure, bench, name=name, help=summary, context_settings=passing)


for _name, _summary in benches.NAMES.items():
    _bench_command(_name, _summary)
_bench_command("all", "Every one of these, one after the other; --json, --out FOLDER, --update-docs.")


def tune(
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="float16, bfloat16 or float32; this and the next may be repeated."),
    ] = None,
    head_dim: Annotated[
        list[str] | None, typer.Option(help="As in 64, or 192,128 where values have their own.")
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
    minutes: Annotated[float | None, typer.Option(min=0, help="Begin nothing new after so long.")] = None,
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
            "--model", help="Rank the candidates by the cycle model of sm_90; needs no GPU, stores nothing."
        ),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Find the fastest tiles of the Triton attention kernels on this GPU; later calls use them.

    Every candidate is compared with a float64 reference before it is timed; those that are right are timed in turns.
    Winners go to the cache folder (FASTATTN_CACHE_DIR), for this device, these versions and these kernels alone. Exits
    with 1 where no tile was right, 2 without a GPU.
    """
    from fastattn.tune import command as tuning

    options = tuning.Options.of(dtype, head_dim, features, kernel, quick, minutes, jobs)
    output = _output(as_json)
    if arch is not None and not dry_run:
        raise InputError("--arch goes with --dry-run: what is measured is the GPU at hand")
    if model and dry_run:
        raise InputError("--model and --dry-run: needs one of them")
    if model:
        from fastattn.tune.model import rank_works

        report = rank_works(options.works(), quick, output)
    else:
        report = (
            tuning.list_candidates(options, arch, output) if dry_run else tuning.tune_here(options, output)
        )
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    if report.get("failed"):
        raise typer.Exit(1)


command(tune, bench)


def model(
    head_dim: Annotated[
        list[int] | None, typer.Option(help="64, 128 or 256; this and the next three may be repeated.")
    ] = None,
    direction: Annotated[
        list[str] | None, typer.Option(help="forward, dkdv, dq, or backward: all gradients in one pass.")
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="triton or cuda; by default what compiles here.")
    ] = None,
    features: Annotated[
        list[str] | None, typer.Option(help="Of Triton's kernels: plain, or features as in causal+window.")
    ] = None,
    cubin: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A compiled file to read instead.")
    ] = None,
    function: Annotated[str, typer.Option(help="With --cubin: part of the kernel's name.")] = "",
    rows: Annotated[
        int | None, typer.Option(min=16, max=1024, help="With --cubin: rows of scores that a block keeps.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Predict the cycles of the 16-bit attention kernels on Hopper from their machine code, without a GPU.

    Kernels are compiled ahead of time and their hot loops replayed on a model of a multiprocessor: cycles for 64 x 128
    scores, the unit in use most, the rate that follows. It measures nothing. Exits with 2 where nothing compiles.
    """
    from fastattn.tune import model as modelling

    options = modelling.Options.of(head_dim, direction, backend, features)
    if cubin is None and (function or rows):
        raise InputError("--function and --rows go with --cubin")
    if cubin is None:
        report = modelling.model_kernels(options, _output(as_json), named=bool(backend))
    else:
        told = (direction[0] if direction else None, head_dim[0] if head_dim else None)
        report = modelling.model_file(cubin, _output(as_json), *told, rows, function)
    if as_json:
        typer.echo(json.dumps(report, indent=2))


command(model, bench)
