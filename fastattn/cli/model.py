"""`fastattn bench model`: predicted cycles of the attention kernels on Hopper."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastattn.cli.command import JsonFlag, output, print_json
from fastattn.console import InputError


def model(
    head_dim: Annotated[
        list[int] | None, typer.Option(help="64, 128 or 256; this and the next three may be repeated.")
    ] = None,
    direction: Annotated[
        list[str] | None, typer.Option(help="forward, dkdv, dq, or backward: all gradients in one pass.")
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="triton or cuda; by default those that can be compiled here.")
    ] = None,
    features: Annotated[
        list[str] | None,
        typer.Option(help="Kinds of calls of Triton's kernels: plain, or features as in causal+window."),
    ] = None,
    cubin: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="A cubin file to read instead of compiling."),
    ] = None,
    function: Annotated[str, typer.Option(help="With --cubin: part of the kernel's name.")] = "",
    rows: Annotated[
        int | None, typer.Option(min=16, max=1024, help="With --cubin: rows of scores of a block.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Predict the cycles of the 16-bit attention kernels on Hopper from their machine code, without a GPU.

    Kernels are compiled ahead of time, and their hot loops are replayed on a model of a multiprocessor. Prints cycles
    for 64 x 128 scores, the busiest unit and the resulting rate. Nothing is measured. Exits with 2 if nothing compiles.
    """
    from fastattn.tune import model as modelling

    options = modelling.Options.of(head_dim, direction, backend, features)
    if cubin is None and (function or rows):
        raise InputError("--function, --rows: are only used with --cubin")
    if cubin is None:
        report = modelling.model_kernels(options, output(as_json), named=bool(backend))
    else:
        told = (direction[0] if direction else None, head_dim[0] if head_dim else None)
        report = modelling.model_file(cubin, output(as_json), *told, rows, function)
    if as_json:
        print_json(report)
