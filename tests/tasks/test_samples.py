"""What an evaluation shows of a model: a text in any case, also for examples that it cannot read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from training_cases import save_encoder, write

from fastattn.data import DataError
from fastattn.tasks import masked_lm
from fastattn.tasks.samples import sample_of
from fastattn.train import run as work
from fastattn.train.run import TASKS


@pytest.mark.parametrize(
    ("texts", "begins", "word"),
    [
        (["one two three four"], "one two [MASK] four -> ", "three"),
        (["one"], "[MASK] -> ", "one"),
        (["  ", "", "我在北京工作"], "我在北[MASK]工作 -> ", "京"),
        ([" "], "[MASK] -> ", "-"),
    ],
)
def test_a_word_or_a_character_is_masked(
    texts: list[str], begins: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = save_encoder(tmp_path / "encoder")
    data = write(tmp_path / "train.jsonl", [{"text": "the old river"}] * 3)
    inputs = work.Inputs("masked-lm", (str(data),), (str(data),), str(encoder), str(tmp_path / "out"))
    made = work.prepare(inputs)
    examples = [SimpleNamespace(text=text) for text in texts]
    shown = sample_of(masked_lm)(made.model.eval(), made.tokenizer, examples, made.data.options)
    assert shown.startswith(begins)
    assert shown.endswith(f" ({word})")


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_an_example_that_cannot_be_read_ends_no_run(task: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise DataError("no room\nfor it")

    sample_of(task)  # every task has one
    monkeypatch.setattr(task, "sample", refuse, raising=False)
    assert sample_of(task)(None, None, [], None) == "no sample: no room for it"
