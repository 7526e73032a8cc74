"""`fastattn demo`: checks and times attention, and trains a model with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastattn.cli.command import JsonFlag, output, print_json

MAX_SEED, MAX_STEPS = 2**63 - 1, 10**9


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

    Exits with 0 if every check passed, 1 if one failed, 2 on bad input.
    """
    from fastattn.demo import run

    summary = run(text, out, seed=seed, steps=steps, quick=quick, output=output(as_json))
    if as_json:
        print_json(summary)
    if not summary["passed"]:
        raise typer.Exit(1)
