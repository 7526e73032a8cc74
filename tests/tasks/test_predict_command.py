"""`fastattn predict`: a line for each text by the head of the folder, or JSON; bad input in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import task_cases
from generation_cases import make
from task_cases import TEXTS
from typer.testing import CliRunner

from fastattn import cli
from fastattn.tasks import predict as tasks

HEADS = {
    "classify": "ForSequenceClassification",
    "tag": "ForTokenClassification",
    "qa": "ForQuestionAnswering",
    "fill": "ForMaskedLM",
    "embed": "Model",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each task; the first reads 8 tokens."""
    made = {}
    for task, head in HEADS.items():
        made[task] = tmp_path_factory.mktemp(task)
        sizes = {"max_position_embeddings": 8} if task == "classify" else {}
        task_cases.save_model(made[task], head, vocab_size=35, **sizes)
    made["causal"] = tmp_path_factory.mktemp("causal")
    make().save_pretrained(made["causal"])
    return made


def invoke(*words: Any, given: str | bytes | None = None) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, ["predict", *map(str, words)], input=given)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def examples(task: str) -> list[dict[str, str]]:
    if task == "qa":
        return [{"question": "who?", "context": text} for text in TEXTS[:3]]
    return [{"text": text + " [MASK]" if task == "fill" else text} for text in TEXTS[:3]]


@pytest.mark.parametrize("task", HEADS)
def test_lines_and_json_are_what_the_task_finds(task: str, folders: dict[str, Path], tmp_path: Path) -> None:
    given = examples(task)
    module = tasks.task_of(folders[task])
    assert task == module.NAME
    model, tokenizer = tasks.load_folder(folders[task], module)
    golden = module.predict(model, tokenizer, given)
    code, out, err = invoke(folders[task], given="".join("\t".join(e.values()) + "\n" for e in given))
    assert (code, out.splitlines()) == (0, [module.line(each) for each in golden])
    assert err.count("\n") == sum(each["cut"] > 0 for each in golden)
    data = tmp_path / "data.jsonl"
    data.write_text("\n\n".join(map(json.dumps, given)) + "\n")
    code, out, err = invoke(folders[task], f"--data={data}", "--json", "--batch-size=32")
    assert code == 0
    assert json.loads(out) == {"task": task, "predictions": golden}


def test_a_text_that_is_cut_is_named(folders: dict[str, Path]) -> None:
    code, out, err = invoke(folders["classify"], "--top-k=1", given=f"{TEXTS[2]}\n{TEXTS[3]}")
    assert code == 0
    assert out.count("\n") == 2
    assert (
        err
        == f"fastattn: text 2: its last {len(task_cases.core().encode(TEXTS[3]).ids) - 8} tokens were not read\n"
    )


@pytest.mark.parametrize(
    ("task", "words", "given", "complaint"),
    [
        ("classify", [], "", "standard input: got no text"),
        ("classify", [], "a\n\nb\n", 'standard input: line 2 has no text under "text"'),
        ("classify", [], b"a\n\xff\n", "standard input: is not text"),
        (
            "classify",
            ["--no-answer"],
            "a",
            "--no-answer: is not an option of the task classify, needs a folder for qa",
        ),
        (
            "embed",
            ["--top-k=2"],
            "a",
            "--top-k: is not an option of the task embed, needs a folder for classify or qa or",
        ),
        ("qa", [], "who?", "standard input: line 1 needs question and context with a tab between them"),
        ("qa", [], "who? " * 50 + "\tx", "question 1: has 102 tokens of the 40 that the model reads"),
        ("fill", [], "a [MASK]\nb", "text 2: holds no [MASK]"),
        ("causal", [], "a", "{folder}: holds a GPT, needs `fastattn generate`"),
    ],
)
def test_bad_input_is_named_in_one_line(
    task: str, words: list[str], given: str | bytes, complaint: str, folders: dict[str, Path]
) -> None:
    code, out, err = invoke(folders[task], *words, given=given)
    assert (code, out) == (2, "")
    assert err.startswith("fastattn: " + complaint.format(folder=folders[task])), err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '{"text": 3}', '{"text": " "}', '{"prompt": "x"}', '{"text": "\\ud800"}', ""]
)
def test_a_line_of_data_without_a_text_is_named(line: str, folders: dict[str, Path], tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(line)
    code, out, err = invoke(folders["classify"], f"--data={data}")
    assert (code, out) == (2, "")
    assert err.startswith(f"fastattn: --data {data}: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("missing", ["folder", "config.json", "tokenizer.json", "model.safetensors"])
def test_a_folder_that_lacks_something_is_named(
    missing: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    if missing != "folder":
        broken.mkdir()
        for path in folders["tag"].iterdir():
            if path.name != missing:
                (broken / path.name).write_bytes(path.read_bytes())
    code, out, err = invoke(broken, given="a")
    assert (code, out) == (2, "")
    assert err.startswith("fastattn: ")
    assert str(broken) in err
    assert err.count("\n") == 1
