"""The examples of docs/training.md run as written, but for the number of steps."""

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


def test_examples_run(tmp_path):
    examples = re.findall(
        r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert len(examples) == 3
    shortened = [example.replace("max_steps=500,", "max_steps=3, eval_batches=2,") for example in examples]
    assert shortened[0] != examples[0]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(shortened)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "validation perplexity" in done.stdout
    assert done.stdout.endswith("0.002 2\n' Hello!<|endoftext|>'\n")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "log.jsonl", "train_config.yaml"} <= names
    assert {"checkpoint-3", "loss.png"} <= names
