"""`fastattn bench`: the benchmarks, each a command."""

from __future__ import annotations

import typer

from fastattn import bench
from fastattn.cli.command import command
from fastattn.cli.model import model
from fastattn.cli.tune import tune

app = typer.Typer(
    help="Measure fastattn beside its peers on this machine: time, error against float64, peak memory.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def _bench_command(name: str, summary: str) -> None:
    """`fastattn bench NAME`; its options, including --help, are the script's."""

    def measure(context: typer.Context) -> None:
        status = bench.run(name, context.args)
        if status:
            raise typer.Exit(status)

    passing = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    command(measure, app, name=name, help=summary, context_settings=passing)


for _name, _summary in bench.NAMES.items():
    _bench_command(_name, _summary)
_bench_command("all", "All of these, one after the other; --json, --out FOLDER, --update-docs.")
command(tune, app)
command(model, app)
