"""Items of a training set by the file and line of their example, or by the text that a packed row begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training_cases import ENCODER_TASKS, rows, save_encoder, write
from typer.testing import CliRunner

from fastattn import cli
from fastattn.train import run as work
from fastattn.train.objective import Objective
from fastattn.train.places import place_of


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


def prepared(task: str, data: Path, model: Path | str, *words: str) -> Any:
    out = str(data.parent / "out")
    return work.prepare(work.Inputs(task, (str(data),), (str(data),), str(model), out, overrides=words))


@pytest.mark.parametrize("task", [task for task in ENCODER_TASKS if task != "masked-lm"])
def test_an_item_has_the_place_of_its_example(task: str, encoder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / f"train.{'conll' if task == 'tag' else 'jsonl'}", rows(task))
    short = ("--task.max_length=12", "--task.stride=2") if task == "qa" else ()
    made = prepared(task, data, encoder, *short)
    where, items = place_of(made), len(made.train_set)
    found = list(dict.fromkeys(map(where, range(items))))
    assert found == [example.where for example in made.data.train]
    assert all(str(data) in place and "line" in place for place in found)
    if task == "qa":  # windows of one context
        assert items > len(found)
        tokens = [made.tokenizer.core.decode(ids) for ids, _ in made.train_set.rows]
        for index, text in enumerate(tokens):
            example = next(e for e in made.data.train if e.where == where(index))
            assert ("anna" in text) == ("anna" in example.question), text


@pytest.mark.parametrize(("task", "model"), [("causal-lm", "nano"), ("masked-lm", "minilm-l6")])
def test_a_row_of_documents_has_the_text_it_begins_with(task: str, model: str, tmp_path: Path) -> None:
    data = write(tmp_path / "train.jsonl", rows("masked-lm"))
    size = (
        ("n_embd=32", "n_layer=1", "n_head=2")
        if model == "nano"
        else ("hidden_size=48", "num_hidden_layers=1")
    )
    words = ("--data.vocab_size=300", "--task.max_length=32", *(f"--model.{each}" for each in size))
    made = prepared(task, data, model, *words)
    where = place_of(made)
    for index in range(len(made.train_set)):
        begins = where(index).removeprefix("begins with '").removesuffix("'")
        assert len(begins) > 5
        assert any(row["text"].startswith(begins[:10]) for row in rows("masked-lm")), begins


def test_a_run_that_diverges_names_files_and_lines(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "train.jsonl", rows("classify"))
    loss = Objective.loss

    def not_finite(self: Objective, model: Any, batch: Any) -> Any:
        return loss(self, model, batch) * (float("nan") if self.losses else 1.0)

    monkeypatch.setattr(Objective, "loss", not_finite)
    words = ["train", "classify", f"--train={data}", f"--dev={data}", f"--model={encoder}"]
    words += [
        f"--out={tmp_path / 'out'}",
        "--train.device=cpu",
        "--train.batch_size=2",
        "--train.accumulate=2",
    ]
    result = CliRunner().invoke(cli.app, [*words, "--train.max_steps=3"])
    assert result.exit_code == 1, result.output
    assert "in the batch of training examples" in result.stderr
    assert result.stderr.count(f"({data}: line ") == 2
