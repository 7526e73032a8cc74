"""Shared parts of the commands: exits on bad input, a full disk and Ctrl-C, and the output."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from fastattn.console import InputError, NoOutput, Output

BAD_INPUT, INTERRUPTED = 2, 130

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def command(function: Callable[..., None], group: typer.Typer, **settings: Any) -> Callable[..., None]:
    """Register a command that prints one line for bad input (exit code 2), a full disk (1) or Ctrl-C (130)."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except InputError as error:
            raise stop(str(error), BAD_INPUT) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has closed the pipe
            raise typer.Exit(1) from None
        except OSError as error:
            raise stop(str(error), 1) from None
        except KeyboardInterrupt:
            raise stop("interrupted", INTERRUPTED) from None

    return group.command(**settings)(guarded)


def stop(message: str, code: int) -> typer.Exit:
    """Print a line with the reason and return the exit of the command."""
    typer.echo(f"fastattn: {message}", err=True)
    return typer.Exit(code)


def output(as_json: bool) -> Output:
    """The output of a command's progress: none with --json."""
    if as_json:
        return NoOutput()
    from fastattn.cli.console import standard_output  # slow to import, and not needed for --help

    return standard_output()


def standard_input() -> str:
    """The text on standard input."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(f"standard input: is not text ({error})") from None


def print_json(report: object) -> None:
    """One JSON object on standard output."""
    typer.echo(json.dumps(report, indent=2))
