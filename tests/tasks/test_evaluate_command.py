"""`fastattn evaluate`: the figures of every task over the whole set, simple methods beside, bad input in one line."""

from __future__ import annotations

import dataclasses
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import task_cases
import torch
from typer.testing import CliRunner

from fastattn import cli, models
from fastattn.data.tokenization import train_bpe
from fastattn.models import BertConfig, EncoderDecoder, EncoderDecoderConfig, bert_decoder
from fastattn.tasks import classify, qa
from fastattn.tasks import evaluate as evaluation

SIZES: dict[str, Any] = {
    "vocab_size": 35, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40, "initializer_range": 0.3,
}  # fmt: skip
LABELS = ("bad", "good", "so so")
SENTENCE_TAGS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}
TEXTS = (
    "Anna lives in Paris.",
    "so good a film",
    "bad film?",
    "the old tower and the river",
    "Maria works for Acmes",
)
DATA: dict[str, list[dict[str, Any]]] = {
    "classify": [{"text": text, "label": LABELS[i % 3]} for i, text in enumerate(TEXTS)],
    "tag": [
        {"tokens": ["Anna", "lives", "in", "Paris", "Berlin"], "tags": ["B-PER", "O", "O", "B-LOC", "I-LOC"]},
        {"tokens": ["so", "good"], "tags": ["O", "O"]},
        {"tokens": ["Maria"], "tags": ["B-PER"]},
    ],
    "qa": [
        {"question": "who lives?", "context": TEXTS[0], "answers": [{"text": "Anna", "answer_start": 0}]},
        {"question": "where?", "context": TEXTS[0], "answers": [{"text": "Paris", "answer_start": 14}]},
        {"question": "who works?", "context": TEXTS[4], "answers": []},
    ],
    "masked-lm": [{"text": text} for text in TEXTS],
    "embed": [{"text": a, "positive": b, "score": i} for i, (a, b) in enumerate(pairwise(TEXTS))],
    "causal-lm": [{"text": text * 4} for text in TEXTS],
    "chat": [{"prompt": a, "completion": b} for a, b in pairwise(TEXTS)],
    "dpo": [{"prompt": a, "chosen": b, "rejected": c} for a, b, c in zip(TEXTS, TEXTS[1:], TEXTS[2:])],
    "seq2seq": [{"source": text, "target": text[::-1] + "."} for text in TEXTS],
}
KEYS = {
    "classify": {"accuracy", "macro_f1", "micro_f1", "ece", "log_loss"},
    "tag": {"f1", "precision", "recall", "macro_f1", "accuracy"},
    "qa": {"exact_match", "f1", "no_answer_accuracy", "has_answer_exact_match", "has_answer_f1"},
    "masked-lm": {"loss", "perplexity", "accuracy"},
    "embed": {"spearman", "pearson"},
    "causal-lm": {"loss", "perplexity", "bits_per_byte", "unknown"},
    "chat": {"loss", "perplexity", "accuracy", "end_accuracy"},
    "dpo": {"accuracy", "margin", "chosen_logprob", "rejected_logprob"},
    "seq2seq": {"bleu", "chrf", "rouge1", "rouge2", "rougeL", "exact_match"},
}
BASELINES = {"classify": ("majority",), "tag": ("majority",), "seq2seq": ("lead", "copy")}
NEEDS = {"seq2seq": "sacrebleu"}


def encoder(cls: Any, **fields: Any) -> Any:
    return cls(BertConfig(**SIZES, **fields))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each task, its model with random weights."""
    torch.manual_seed(0)
    config = BertConfig(**SIZES)
    made: dict[str, Any] = {
        "classify": encoder(models.BertForSequenceClassification, id2label=dict(enumerate(LABELS))),
        "tag": encoder(models.BertForTokenClassification, id2label=SENTENCE_TAGS),
        "qa": encoder(models.BertForQuestionAnswering),
        "masked-lm": encoder(models.BertForMaskedLM),
        "embed": encoder(models.Bert),
        "seq2seq": EncoderDecoder(
            EncoderDecoderConfig(
                config, bert_decoder(config), decoder_start_token_id=2, eos_token_id=3, pad_token_id=0
            )
        ),
    }
    found = {}
    for task, model in made.items():
        found[task] = tmp_path_factory.mktemp("folder")
        save_encoder(found[task], model)
    tokenizer = train_bpe(list(TEXTS), 280)
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
    eos = {"eos_token_id": tokenizer.eos_id, "bos_token_id": tokenizer.eos_id}
    gpt = models.GPT(models.GPTConfig(vocab_size=tokenizer.vocab_size, **sizes, **eos))
    found["causal-lm"] = found["chat"] = found["dpo"] = tmp_path_factory.mktemp("folder")
    gpt.save_pretrained(found["causal-lm"], tokenizer=tokenizer)
    return found


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    paths = {}
    for task, entries in DATA.items():
        paths[task] = tmp_path / f"{task}.jsonl"
        paths[task].write_text("\n".join(json.dumps(entry) for entry in entries) + "\n", encoding="utf-8")
    return paths


def invoke(*words: Any) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, ["evaluate", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("task", DATA)
def test_figures_are_of_the_whole_set(task: str, folders: dict[str, Path], data: dict[str, Path]) -> None:
    """Batches change no figure beyond rounding, and a table has every figure, the simple methods' beside."""
    if task in NEEDS:
        pytest.importorskip(NEEDS[task])
    named = ["--task", task] if task in ("chat", "dpo") else []
    words = [folders[task], "--data", data[task], *named]
    for name in BASELINES.get(task, ()):
        words += ["--baseline", name]
    if task == "tag":
        words += ["--train", data[task]]
    found = []
    for size in (1, 3, 64):
        code, out, err = invoke(*words, "--batch-size", size, "--json")
        assert (code, err) == (0, "")
        found.append(json.loads(out))
    assert set(found[0]) == {
        "task", "folder", "count", "metrics", "tables", "signatures", "baselines", "seconds",
    }  # fmt: skip
    assert (found[0]["task"], set(found[0]["metrics"])) == (task, KEYS[task])
    assert set(found[0]["baselines"]) == set(BASELINES.get(task, ()))
    for other in found[1:]:
        assert other["count"] == found[0]["count"]
        assert other["metrics"] == pytest.approx(found[0]["metrics"], rel=64 * torch.finfo(torch.float32).eps)
    code, out, err = invoke(*words)
    assert (code, err) == (0, "")
    for name in KEYS[task]:
        assert name in out
    for name in BASELINES.get(task, ()):
        assert name in out


def test_a_classifiers_figures_are_those_of_its_predictions(
    folders: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    words = ["predict", str(folders["classify"]), "--data", str(data["classify"]), "--json"]
    predicted = json.loads(CliRunner().invoke(cli.app, words).stdout)["predictions"]
    labels = [each["labels"][0]["label"] for each in predicted]
    right = [label == entry["label"] for label, entry in zip(labels, DATA["classify"])]
    exit_code, out, _ = invoke(
        folders["classify"], "--data", data["classify"], "--json", "--plots", tmp_path / "plots"
    )
    found = json.loads(out)
    assert exit_code == 0
    assert found["metrics"]["accuracy"] == sum(right) / len(right)
    assert sum(map(sum, found["tables"]["confusion"]["counts"])) == len(TEXTS)
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "confusion.png",
        "reliability.png",
    ]


def test_simple_methods_by_hand(folders: dict[str, Path], data: dict[str, Path], tmp_path: Path) -> None:
    _, out, _ = invoke(folders["classify"], "--data", data["classify"], "--baseline", "majority", "--json")
    assert (
        json.loads(out)["baselines"]["majority"]["accuracy"] == 2 / 5
    )  # "bad" and "good" twice each: the first
    words = [
        folders["tag"],
        "--data",
        data["tag"],
        "--train",
        data["tag"],
        "--baseline",
        "majority",
        "--json",
    ]
    assert json.loads(invoke(*words)[1])["baselines"]["majority"]["f1"] == 1.0  # no word has two tags here
    model = encoder(models.BertForTokenClassification, id2label={0: "NOUN", 1: "VERB"})
    sentences = tmp_path / "classes.jsonl"
    lines = [{"tokens": ["anna", "lives"], "tags": ["NOUN", "VERB"]}, {"tokens": ["lives"], "tags": ["NOUN"]}]
    sentences.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    words = [save_encoder(tmp_path / "classes", model), *words[1:]]
    words[2] = words[4] = sentences
    assert json.loads(invoke(*words)[1])["baselines"]["majority"] == {"accuracy": pytest.approx(2 / 3)}
    pytest.importorskip("sacrebleu")
    same = tmp_path / "same.jsonl"
    same.write_text(json.dumps({"source": "One. Two.", "target": "One."}) + "\n", encoding="utf-8")
    _, out, _ = invoke(
        folders["seq2seq"], "--data", same, "--baseline", "lead", "--baseline", "copy", "--json"
    )
    found = json.loads(out)
    assert found["baselines"]["lead"]["exact_match"] == 1.0
    assert found["baselines"]["copy"]["rouge1"] == pytest.approx(2 / 3)
    assert found["signatures"]["bleu"].startswith("nrefs:1|")


def save_encoder(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    task_cases.core().save(str(folder / "tokenizer.json"))
    settings = {"mask_token": "[MASK]", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def test_numbers_and_several_labels(tmp_path: Path) -> None:
    made = {
        "regression": {"num_labels": 1},
        "multi_label_classification": {"id2label": dict(enumerate(LABELS))},
    }
    labels: dict[str, list[Any]] = {
        "regression": [1, 2, 4, 5],
        "multi_label_classification": [["bad"], [], ["good"], []],
    }
    found = {}
    for kind, fields in made.items():
        model = encoder(models.BertForSequenceClassification, problem_type=kind, **fields)
        folder = save_encoder(tmp_path / kind, model)
        path = tmp_path / f"{kind}.jsonl"
        lines = [json.dumps({"text": t, "label": label}) for t, label in zip(TEXTS, labels[kind])]
        path.write_text("\n".join(lines), encoding="utf-8")
        code, out, err = invoke(folder, "--data", path, "--json", "--baseline", "majority")
        found[kind] = json.loads(out) if code == 0 else err
    assert set(found["regression"]["metrics"]) == {"pearson", "spearman", "mse", "mae"}
    assert found["regression"]["baselines"]["majority"] == {
        "pearson": None,
        "spearman": None,
        "mse": 2.5,
        "mae": 1.5,
    }
    assert "--baseline majority: needs examples with one label each" in found["multi_label_classification"]
    words = [
        tmp_path / "multi_label_classification",
        "--data",
        tmp_path / "multi_label_classification.jsonl",
        "--json",
    ]
    assert set(json.loads(invoke(*words)[1])["metrics"]) == {"accuracy", "macro_f1", "micro_f1", "ece"}


def test_columns_and_options_are_taken(folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("body,topic\nso good a film,good\nbad film,bad\n", encoding="utf-8")
    words = [
        folders["classify"],
        "--data",
        path,
        "--column",
        "text=body",
        "--column",
        "label=topic",
        "--json",
    ]
    assert invoke(*words, "--option", "max_length=4")[0] == 0
    text = tmp_path / "text.txt"
    text.write_text("so good a film " * 20 + "\n\n\nbad film\n", encoding="utf-8")
    lengths = [
        json.loads(invoke(folders["causal-lm"], "--data", text, "--option", f"max_length={n}", "--json")[1])
        for n in (16, 64)
    ]
    assert lengths[0]["count"] == lengths[1]["count"]
    assert lengths[0]["tables"]["documents"] == 2
    assert lengths[0]["metrics"]["loss"] != lengths[1]["metrics"]["loss"]


def test_every_option_takes_its_values_as_words() -> None:
    """Words that YAML reads as something else, too."""
    for task in evaluation.TASKS:
        for field in dataclasses.fields(task.Options):
            value = field.default
            assert evaluation.options_of(task, [f"{field.name}={value}"]) == task.Options(), (
                task,
                field.name,
            )
    for word in ("yes", "no"):
        assert evaluation.options_of(qa, [f"no_answer={word}"]).no_answer == word
    for word in ("|", "#", "1", "; ", "true", "[]", "="):
        assert evaluation.options_of(classify, [f"separator={word}"]).separator == word
    assert evaluation.options_of(classify, ["temperature=1e1"]).temperature == 10.0


def bad_words(
    folders: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> dict[str, tuple[list[Any], str]]:
    def file(name: str, text: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    folder, classes = folders["classify"], ["--data", data["classify"]]
    unknown = file("label.jsonl", '{"text": "a", "label": "good"}\n{"text": "b", "label": "ugly"}\n')
    (empty := tmp_path / "empty").mkdir()
    return {
        "no folder": ([tmp_path / "nowhere", *classes], "no such folder"),
        "no model": ([empty, *classes], "config.json"),
        "no data": ([folder], "--data: got none"),
        "no file": ([folder, "--data", tmp_path / "nowhere.jsonl"], "no such file"),
        "an empty file": ([folder, "--data", file("empty.jsonl", "")], "holds no example"),
        "not UTF-8": ([folder, "--data", file("latin.jsonl", b'{"text": "\xe9"}')], "line 1 is not UTF-8"),
        "no label": ([folder, "--data", data["causal-lm"]], "line 1 has no 'label'"),
        "another label": ([folder, "--data", unknown], "line 2: label 'ugly' is not one of the model's"),
        "an unknown task": ([folder, *classes, "--task", "classy"], "--task: got 'classy'"),
        "another task": ([folder, *classes, "--task", "tag"], "--task tag"),
        "an unknown option": ([folder, *classes, "--option", "length=3"], "--option length=3"),
        "a bad option": ([folder, *classes, "--option", "max_length=-3"], "--option max_length: got -3"),
        "a bad column": ([folder, *classes, "--column", "label"], "--column"),
        "no column": ([folder, *classes, "--column", "label=topic"], "line 1 has no column 'topic'"),
        "an unknown method": ([folder, *classes, "--baseline", "best"], "--baseline: got 'best'"),
        "another's method": ([folder, *classes, "--baseline", "lead"], "--baseline lead: is not a method for classify"),
        "no method": ([folder, *classes, "--train", data["classify"]], "--train: is only used with --baseline"),
        "no training data": ([folder, *classes, "--baseline", "tfidf"], "needs --train"),
        "plots of texts": (
            [folders["causal-lm"], "--data", data["causal-lm"], "--plots", tmp_path / "plots"],
            "--plots: the task causal-lm has none",
        ),
        "too few positions": (
            [folders["causal-lm"], "--data", data["causal-lm"], "--option", "max_length=1000"],
            "task.max_length: got 1000, the model has 64 positions",
        ),
    }  # fmt: skip


def test_a_missing_package_is_named_before_any_work(
    folders: dict[str, Path], data: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastattn.tasks.evaluate.load_folder", None)
    for package in ("sacrebleu.metrics", "sklearn.svm", "sklearn.feature_extraction"):
        monkeypatch.setitem(sys.modules, package, None)
    words = [
        folders["classify"],
        "--data",
        data["classify"],
        "--train",
        data["classify"],
        "--baseline",
        "tfidf",
    ]
    for given in ([folders["seq2seq"], "--data", data["seq2seq"]], words):
        code, out, err = invoke(*given)
        assert (code, out) == (2, "")
        assert err.endswith("pip install 'fastattn[evaluate]'\n")


def test_bad_input_is_one_line(folders: dict[str, Path], data: dict[str, Path], tmp_path: Path) -> None:
    for name, (words, message) in bad_words(folders, data, tmp_path).items():
        code, out, err = invoke(*words)
        assert (code, out) == (2, ""), (name, err)
        assert err.startswith("fastattn: "), (name, err)
        assert err.count("\n") == 1, (name, err)
        assert message in err, (name, err)
