"""lm-evaluation-harness against the server, on a task file: the scores are those of the in-process model."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import serve_cases
import torch

from fastattn.data import Tokenizer
from fastattn.models import load

QUESTIONS = [
    {"context": "the river runs to", "choices": [" the sea", " the old town", " who"], "gold": 0},
    {"context": "a tower in", "choices": [" the old town", " a river", " there"], "gold": 1},
    {"context": "who lives", "choices": [" there?", " in the sea", " runs"], "gold": 2},
]
TASK = """
task: towns
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lm_eval")


@pytest.fixture(scope="module")
def port(root: Path) -> Iterator[int]:
    serve_cases.save_gpt(root / "gpt2")
    words = [sys.executable, "-m", "fastattn", "serve", "gpt2", "--port=0"]
    with subprocess.Popen(words, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = int(process.stdout.readline().rpartition(":")[2])
            for _ in range(400):
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{found}/ready", timeout=30).close()
                    break
                time.sleep(0.05)
            yield found
        finally:
            process.kill()


@pytest.mark.downloads
def test_local_completions_gives_the_scores_of_the_in_process_model(root: Path, port: int) -> None:
    """Needs lm_eval with what its API models import (aiohttp, tenacity)."""
    for package in ("lm_eval", "aiohttp", "tenacity", "uvicorn", "fastapi"):
        if find_spec(package) is None:
            pytest.skip(f"needs {package}")
    (root / "tasks").mkdir()
    data = root / "towns.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS), encoding="utf-8")
    (root / "tasks" / "towns.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    arguments = {
        "model": "gpt2",
        "base_url": f"http://127.0.0.1:{port}/v1/completions",
        "tokenizer": root / "gpt2",
        "num_concurrent": 4,
        "max_length": serve_cases.SIZES["n_positions"],
    }
    words = [
        sys.executable, "-m", "lm_eval", "--model", "local-completions", "--tasks", "towns", "--include_path",
        str(root / "tasks"), "--model_args", ",".join(f"{name}={value}" for name, value in arguments.items()),
        "--log_samples", "--output_path", str(root / "out"),
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(root / "cache")}
    done = subprocess.run(words, env=environment, cwd=root, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    (samples,) = (root / "out").rglob("samples_towns_*.jsonl")
    (results,) = (root / "out").rglob("results_*.json")
    found = {}
    for line in samples.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        found[sample["doc"]["context"]] = [float(score) for score, _ in sample["filtered_resps"]]

    tokenizer, model = Tokenizer.from_pretrained(root / "gpt2"), load(root / "gpt2")
    right = 0
    bound = 64 * torch.finfo(torch.float32).eps
    for question in QUESTIONS:
        expected = []
        for choice in question["choices"]:
            ids = tokenizer.encode(f"{question['context']}{choice}")
            start = len(tokenizer.encode(str(question["context"])))
            logprobs = model(torch.tensor([ids])).logits[0].detach().float().log_softmax(-1)
            expected.append(sum(float(logprobs[at - 1, ids[at]]) for at in range(start, len(ids))))
        assert found[question["context"]] == pytest.approx(expected, rel=bound, abs=len(ids) * bound)
        right += expected.index(max(expected)) == question["gold"]
    accuracy = json.loads(results.read_text(encoding="utf-8"))["results"]["towns"]["acc,none"]
    assert accuracy == pytest.approx(right / len(QUESTIONS))
