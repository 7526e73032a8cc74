"""The commands of docs/training.md run on the data of the page as it stands, with a tiny encoder in MiniLM's place."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import training_cases
from typer.testing import CliRunner

from fastattn import cli

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
RUN = re.findall(r"<!-- run by tests/train/test_task_examples.py -->\n```bash\n(.*?)\n```", PAGE)


def test_every_encoder_task_has_a_command() -> None:
    assert {shlex.split(line)[2] for line in RUN} >= set(training_cases.ENCODER_TASKS)
    assert all(f"### {name}\n" in PAGE for name in training_cases.ENCODER_TASKS)


@pytest.mark.parametrize("line", RUN, ids=[shlex.split(line)[2] for line in RUN])
def test_commands_run(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    if "all-MiniLM-L6-v2" in line:
        training_cases.save_encoder(tmp_path / "all-MiniLM-L6-v2", max_position_embeddings=128)
    words = shlex.split(line)[1:]
    result = CliRunner().invoke(cli.app, [*words, "--train.max_steps=2", "--train.device=cpu", "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    report = json.loads(result.stdout)
    assert report["steps"] >= 1
    assert report["metrics"]
    assert (Path(report["out"]) / "report.json").is_file()
