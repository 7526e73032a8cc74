"""`fastattn evaluate`: metrics of a model's folder on labelled data, with those of baselines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastattn.cli.command import JsonFlag, output, print_json
from fastattn.cli.predict import check_batch_size


def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model's folder with its tokenizer.")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="File, folder or data set with labelled examples; needed, may be repeated."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Task to evaluate; by default that of the folder's head.")
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="Also evaluate majority, tfidf, lead or copy; may be repeated."),
    ] = None,
    train: Annotated[
        list[str] | None, typer.Option(help="Labelled examples to train majority and tfidf on.")
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD=COLUMN", help="The file's column for a field; may be repeated."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of the task, as max_length=256; may be repeated."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Texts at a time; does not change the metrics.")
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Folder for the reliability plot and the confusion table.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Evaluate a model's folder on a file with labels: the metrics of its task over the whole set.

    Language models: perplexity per token and bits per byte. Classifiers: accuracy, F1, calibration. Tags: F1 of
    entities. Questions: exact match and F1. Encoder-decoders: BLEU, chrF, ROUGE. Embeddings: Spearman's correlation.
    docs/evaluation.md documents every key. Exits with 2 on bad input.
    """
    check_batch_size(batch_size)
    from fastattn.tasks import evaluate as work

    found = work.evaluate(
        folder, data or (), task=task, baseline=baseline or (), train=train or (), columns=column or (),
        options=option or (), batch_size=batch_size, plots=plots,
    )  # fmt: skip
    if as_json:
        print_json(found.to_dict())
        return
    shown = output(False)
    shown.heading(
        f"{found.task}: {found.report.count} {'tokens' if 'bytes' in found.report.tables else 'examples'}"
    )
    shown.table(*found.rows())
    for name, signature in found.report.signatures.items():
        shown.line(f"{name}: {signature}")
