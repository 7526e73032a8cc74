"""The tokenizer's files of a trained folder: its tokens, and the length that the run was trained with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import task_cases
from training_cases import QUICK, rows, save_encoder, write

from fastattn.data.encoding import InputTokenizer
from fastattn.data.input_tokenizers import train_input_tokenizer
from fastattn.tasks.evaluate import evaluate
from fastattn.train import run as work

STEP = (*QUICK, "--train.max_epochs=1")


def trained(task: str, folder: Path, given: list[dict[str, Any]], model: str, *more: str) -> dict[str, Any]:
    """The report of a run whose training data are its dev set too."""
    data = str(write(folder / "train.jsonl", given))
    inputs = work.Inputs(task, (data,), (data,), model, str(folder / "out"), overrides=(*STEP, *more))
    return work.train(inputs)


def settings_of(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text())
    return settings


@pytest.mark.parametrize("task", ["classify", "tag", "qa"])
def test_the_folder_names_the_length_of_the_run(task: str, tmp_path: Path) -> None:
    import transformers

    encoder = save_encoder(tmp_path / "encoder")
    given = rows(task)
    if task == "classify":
        given = [{**row, "text": "the old tower and " * 3 + row["text"]} for row in given]
    elif task == "qa":
        given = [{**row, "context": row["context"] + " the old tower" * 5} for row in given]
    report = trained(task, tmp_path, given, str(encoder), "--task.max_length=14", "--train.max_epochs=3")
    out, data = tmp_path / "out", str(tmp_path / "train.jsonl")
    before, after = settings_of(encoder), settings_of(out)
    assert after == {**before, "model_max_length": 14}
    assert transformers.AutoTokenizer.from_pretrained(out).model_max_length == 14
    assert evaluate(out, [data]).report.metrics == pytest.approx(report["metrics"])
    if task == "classify":
        longer = evaluate(out, [data], options=["max_length=40"]).report.metrics
        assert longer != pytest.approx(report["metrics"])


def test_other_folders_keep_their_length(tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path / "encoder")
    trained("classify", tmp_path, rows("classify"), str(encoder))
    assert (encoder / "tokenizer_config.json").read_bytes() == (
        tmp_path / "out" / "tokenizer_config.json"
    ).read_bytes()


@pytest.mark.parametrize("new", [False, True])
def test_only_new_masked_language_models_are_of_the_length_of_their_passages(
    new: bool, tmp_path: Path
) -> None:
    small = ("--model.num_hidden_layers=1", "--model.hidden_size=48", "--data.vocab_size=100")
    model = "minilm-l6" if new else str(save_encoder(tmp_path / "encoder"))
    trained("masked-lm", tmp_path, rows("masked-lm"), model, "--task.max_length=12", *(small if new else ()))
    longest = InputTokenizer.from_pretrained(tmp_path / "out").max_length
    assert longest == (12 if new else InputTokenizer.from_pretrained(tmp_path / "encoder").max_length)


def test_characters_that_tagging_divides_are_divided_in_the_folder(tmp_path: Path) -> None:
    import transformers

    texts = ["我在北京工作", "他在北京"]
    learnt = train_input_tokenizer("bpe", texts * 20, 300)
    encoder = tmp_path / "encoder"
    task_cases.save_model(encoder, "Model", vocab_size=learnt.core.get_vocab_size())
    learnt.save_pretrained(encoder)
    tags = {"北": "B-LOC", "京": "I-LOC"}
    given = [{"tokens": list(text), "tags": [tags.get(c, "O") for c in text]} for text in texts * 8]
    report = trained("tag", tmp_path, given, str(encoder), "--train.max_epochs=12")
    assert report["metrics"]["f1"] == 1.0
    out = tmp_path / "out"
    saved = InputTokenizer.from_pretrained(out)
    (row,) = saved.encode(texts[:1])
    assert all(last - first <= 1 for first, last in row.offsets)
    assert transformers.AutoTokenizer.from_pretrained(out)(texts[0])["input_ids"] == row.ids
    assert evaluate(out, [str(tmp_path / "train.jsonl")]).report.metrics["f1"] == 1.0
