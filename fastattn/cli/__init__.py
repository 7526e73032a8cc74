"""The fastattn command: the state of the machine, a demonstration, models and benchmarks.

A file per command parses and prints; the command's work is in a module of the package that is imported when the
command runs.
"""

from __future__ import annotations

from typing import Annotated

import typer

from fastattn.cli import bench, build, demo, doctor, evaluate, generate, predict, serve, train
from fastattn.cli.command import command

__all__ = ["app", "main"]

app = typer.Typer(
    name="fastattn",
    help="Fused attention for PyTorch: check this machine, try fastattn, train and run models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """The console script."""
    app()


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


command(doctor.doctor, app)
command(demo.demo, app)
command(build.build, app)
command(generate.generate, app)
command(predict.predict, app)
command(serve.serve, app)
command(train.train, app, context_settings=train.OVERRIDES)
command(evaluate.evaluate, app)
app.add_typer(bench.app, name="bench")
