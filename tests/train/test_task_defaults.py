"""The table of docs/training.md has the defaults of every task, as a run without options has them."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from fastattn.tasks.training import learning_rate
from fastattn.train import TrainConfig
from fastattn.train.optim import WARMUP
from fastattn.train.run import TASKS

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
HEAD = re.search(r"^\| task \| (`max_epochs` .*) \|$", PAGE, re.MULTILINE)
assert HEAD is not None
COLUMNS = HEAD[1].replace("`", "").split(" | ")
ROWS = dict(
    re.findall(rf"^\| `([\w-]+)` \| ((?:[^|]+ \| ){{{len(COLUMNS) - 1}}}[^|]+) \|$", PAGE, re.MULTILINE)
)
# Of others it is the limit of the model.
LENGTHS = {"qa": 384, "masked-lm": 128, "causal-lm": 1024, "chat": 1024, "dpo": 1024}


def test_every_task_has_a_row() -> None:
    assert ROWS.keys() == TASKS.keys()


@pytest.mark.parametrize("name", TASKS)
def test_a_row_has_the_task_s_defaults(name: str) -> None:
    task = TASKS[name]
    shown = dict(zip(COLUMNS, ROWS[name].split(" | ")))
    length = shown.pop("task.max_length")
    assert length == str(LENGTHS.get(name, "the model's limit"))
    assert task.Options().max_length is None
    assert getattr(task, "MAX_LENGTH", LENGTHS.get(name)) == LENGTHS.get(name)
    assert task.DEFAULTS.keys() <= shown.keys()
    general = {field.name: field.default for field in fields(TrainConfig)}
    for option, text in shown.items():
        if option == "lr" and "lr" not in task.DEFAULTS:
            assert text == "by width"
        else:
            assert float(text) == task.DEFAULTS.get(option, general[option]), option


def test_the_rate_by_width_and_the_warmup_are_those_of_the_page() -> None:
    text = " ".join(PAGE.split())
    assert "The rate by width is 30 / width², at most 3e-4: 2e-4 at 384, 5e-5 at 768." in text
    assert [f"{learning_rate(width):.0e}" for width in (384, 768)] == ["2e-04", "5e-05"]
    assert learning_rate(384) == 30 / 384**2
    assert learning_rate(16) == 3e-4
    assert "a warmup over a tenth of the steps, or of the time where that may end the run" in text
    assert WARMUP == 0.1
