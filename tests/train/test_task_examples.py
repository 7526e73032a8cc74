"""The commands of docs/training.md run on the data of the page as it stands, with tiny models in place of folders."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import training_cases
from typer.testing import CliRunner

from fastattn import cli
from fastattn.data import train_bpe
from fastattn.models import GPT, GPTConfig
from fastattn.train.run import TASKS

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
RUN = re.findall(r"<!-- run by tests/train/test_task_examples.py -->\n```bash\n(.*?)\n```", PAGE, re.DOTALL)


def test_every_task_has_a_command() -> None:
    assert {shlex.split(line)[2] for block in RUN for line in block.splitlines()} == TASKS.keys()
    assert all(f"### {name}\n" in PAGE for name in training_cases.ENCODER_TASKS)


@pytest.mark.parametrize("block", RUN, ids=[shlex.split(block)[2] for block in RUN])
def test_commands_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a block one after another, as they read each other's folders."""
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    if "all-MiniLM-L6-v2" in block:
        training_cases.save_encoder(tmp_path / "all-MiniLM-L6-v2", max_position_embeddings=128)
    if "-folder" in block:
        save_decoders(tmp_path)
    for line in block.splitlines():
        words = shlex.split(line)[1:]
        if "seq2seq" in words:
            pytest.importorskip("sacrebleu")
        result = CliRunner().invoke(cli.app, [*words, "--train.max_steps=2", "--train.device=cpu", "--json"])
        assert result.exit_code == 0, (line, result.output, result.exception)
        report = json.loads(result.stdout)
        assert report["steps"] >= 1
        assert report["metrics"]
        assert (Path(report["out"]) / "report.json").is_file()


def save_decoders(place: Path) -> None:
    """The folders of decoders that the page names, with the same tokens."""
    tokenizer = train_bpe(FILES["speeches.txt"].split("\n"), vocab_size=280)
    for name, width in (("gpt2-folder", 32), ("small-folder", 16), ("large-folder", 32)):
        torch.manual_seed(0)
        sizes = {"n_positions": 64, "n_embd": width, "n_layer": 1, "n_head": 2}
        config = GPTConfig(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id, **sizes)
        GPT(config).save_pretrained(place / name, tokenizer=tokenizer)
