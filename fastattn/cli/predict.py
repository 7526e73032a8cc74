"""`fastattn predict`: classes, entities, answers, missing words or vectors of texts, by the head of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastattn.cli.command import JsonFlag, print_json, standard_input
from fastattn.console import InputError

MAX_BATCH, MAX_COUNT = 2**16, 2**16


def check_batch_size(number: int | None) -> None:
    """Refuse a number of texts at a time that is out of range."""
    if number is not None and not 1 <= number <= MAX_BATCH:
        raise InputError(f"--batch-size: got {number}, needs a number of texts from 1 to {MAX_BATCH}")


def predict(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model's folder with its tokenizer.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help='JSONL file with "text" in each line, or "question" and "context"; else standard input.'
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Texts at a time.")] = 32,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_COUNT, help="Most classes, answers or words; all, 1 and 5 by default."),
    ] = None,
    no_answer: Annotated[bool, typer.Option("--no-answer", help="Allow 'no answer' as an answer.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Predict with an encoder's folder: a line for each text of standard input, in the same order.

    The folder's head decides what: classes with scores, entities, answers (question, tab, context), the words for
    [MASK], or vectors. A text longer than the model's limit is truncated, and a line on standard error says so.
    Exits with 2 on bad input.
    """
    check_batch_size(batch_size)
    from fastattn.tasks import predict as work

    task = work.task_of(folder)
    given = {"batch_size": batch_size, "top_k": top_k, "no_answer": no_answer or None}
    options = work.check_options(task, given)
    examples = work.examples_of(task, data, standard_input() if data is None else None)
    model, tokenizer = work.load_folder(folder, task)
    predictions = work.predictions_of(task, model, tokenizer, examples, options)
    for number, prediction in enumerate(predictions, 1):
        if prediction["cut"]:
            typer.echo(
                f"fastattn: text {number}: its last {prediction['cut']} tokens were not read", err=True
            )
    if as_json:
        print_json({"task": task.NAME, "predictions": predictions})
    else:
        for prediction in predictions:
            typer.echo(task.line(prediction))
