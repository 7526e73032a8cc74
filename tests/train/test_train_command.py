"""`fastattn train TASK`: from files to a folder that predicts, resumes and loads elsewhere; bad input in one line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import training_cases
from training_cases import ENCODER_TASKS, QUICK, rows, save_encoder, write
from typer.testing import CliRunner

from fastattn import cli
from fastattn.data.input_tokenizers import train_input_tokenizer
from fastattn.models import families
from fastattn.tasks import predict as predicting
from fastattn.train import load_config, tokenizing
from fastattn.train import run as work
from fastattn.train.checkpoint import read_model
from fastattn.train.task_config import DataConfig, LoraConfig

SUFFIX = {"tag": "conll"}


def invoke(*words: Any) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, list(map(str, words)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def runs(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Each task trained, the best model picked on the training data: its folder and the report."""
    made = {}
    for task in ENCODER_TASKS:
        place = tmp_path_factory.mktemp(task)
        data = write(place / f"train.{SUFFIX.get(task, 'jsonl')}", rows(task))
        words = ("train", task, "--train", data, "--dev", data, "--model", encoder, "--out", place / "out")
        words = (*words, *QUICK, "--json")
        code, out, err = invoke(*words)
        assert code == 0, (task, err)
        made[task] = (place / "out", json.loads(out))
    return made


@pytest.mark.parametrize("task", ENCODER_TASKS)
def test_the_loss_falls_and_the_report_says_so(task: str, runs: Any) -> None:
    out, report = runs[task]
    assert report == json.loads((out / "report.json").read_text())
    assert report["best"]["loss"] < report["first"]["loss"]
    assert (report["task"], report["interrupted"], report["dev"]["held_out_of_train"]) == (task, False, False)
    assert report["dev"]["examples"] == report["train"]["examples"] == len(rows(task))
    assert report["flops"] > 0
    assert report["peak_memory"] > 0
    figure = report["best"]["figure"]
    if figure != "loss":  # whose masks are drawn anew
        assert report["metrics"][figure] == pytest.approx(report["best"]["figures"][figure])


@pytest.mark.parametrize(
    ("task", "lines", "expected"),
    [
        ("classify", "bad film new\ngood tower so\n", ["bad!", "good!"]),
        ("tag", "anna works for berlin .\nmaria lives in paris ?\n", ["PER", "LOC"]),
        ("qa", "where does maria live?\tmaria works for paris .\n", ["paris"]),
    ],
)
def test_the_folder_predicts_what_was_learnt(task: str, lines: str, expected: list[str], runs: Any) -> None:
    out, _ = runs[task]
    result = CliRunner().invoke(cli.app, ["predict", str(out), "--json"], input=lines)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["task"] == task
    for number, prediction in enumerate(found["predictions"]):
        if task == "classify":
            assert prediction["labels"][0]["label"] == expected[number]
        elif task == "tag":
            assert [entity["entity"] for entity in prediction["entities"]] == expected
        else:
            assert prediction["answers"][0]["answer"] == expected[number]


@pytest.mark.parametrize("task", ENCODER_TASKS)
def test_each_evaluation_shows_a_prediction_and_the_end_the_curve(task: str, runs: Any) -> None:
    out, _ = runs[task]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    shown = [record["text"] for record in log if record["event"] == "sample"]
    assert len(shown) == len([record for record in log if record["event"] == "eval"]) > 2
    begins, *ends = {
        "classify": ("good film old -> good! 0.", "bad! 0."),
        "tag": ("anna lives in paris . -> PER 0.", "0:4 anna, LOC 0."),
        "qa": ("where does anna live? -> paris 0.", "14:19"),
        "masked-lm": ("anna lives [MASK] paris . -> ", " (in)"),
        "embed": ("anna . -> 0.", " the river good, ", " the river bad"),
    }[task]
    assert shown[-1].startswith(begins)
    assert all(part in shown[-1] for part in ends)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_curve_that_cannot_be_drawn_ends_no_run(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no font\nat all")

    data = write(tmp_path / "train.jsonl", rows("classify"))
    words = ("train", "classify", "--train", data, "--dev", data, "--model", encoder, "--train.max_steps=1")
    for name, place, change, said in (
        ("broken", "end_of_run.plot_loss", fail, "no loss.png: no font at all"),
        (
            "missing",
            "end_of_run.plot.is_available",
            lambda: False,
            "no loss.png: matplotlib is not installed",
        ),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(f"fastattn.train.{place}", change)
            code, text, err = invoke(*words, "--out", tmp_path / name, "--train.device=cpu")
        assert code == 0, err
        assert said in text
        assert (tmp_path / name / "report.json").is_file()
        assert not (tmp_path / name / "loss.png").exists()


@pytest.mark.parametrize("task", ENCODER_TASKS)
def test_transformers_reads_the_folder(task: str, runs: Any) -> None:
    import transformers

    out, _ = runs[task]
    classes = {
        "classify": transformers.AutoModelForSequenceClassification,
        "tag": transformers.AutoModelForTokenClassification,
        "qa": transformers.AutoModelForQuestionAnswering,
        "masked-lm": transformers.AutoModelForMaskedLM,
        "embed": transformers.AutoModel,
    }
    theirs = classes[task].from_pretrained(out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ours = families.load(out)
    inputs = tokenizer("anna works for berlin", return_tensors="pt")
    with torch.no_grad():
        golden = theirs(**inputs)
        found = ours.bert(**inputs) if task == "embed" else ours(**inputs)
    name = {"qa": "start_logits", "embed": "last_hidden_state"}.get(task, "logits")
    torch.testing.assert_close(getattr(found, name), getattr(golden, name))


def test_several_labels_come_from_a_mapped_table(encoder: Path, tmp_path: Path) -> None:
    """CSV with other names of columns, labels separated by a bar; the folder gives each label by itself."""
    lines = ["body,topics"]
    for row in rows("classify"):
        lines.append(f'"{row["text"]}",{"good|nice" if row["label"] == "good!" else "bad"}')
    (tmp_path / "train.csv").write_text("\n".join(lines))
    words = ("train", "classify", "--train", tmp_path / "train.csv", "--dev", tmp_path / "train.csv")
    words = (*words, "--model", encoder, "--out", tmp_path / "out", *QUICK, "--train.max_epochs=12")
    code, out, err = invoke(*words, "--data.columns=text=body,label=topics", "--task.separator=|", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["labels"] == ["bad", "good", "nice"]
    assert report["best"]["figure"] == "micro_f1"
    assert report["best"]["loss"] < report["first"]["loss"]
    result = CliRunner().invoke(
        cli.app, ["predict", str(tmp_path / "out"), "--json"], input="good tower so\n"
    )
    found = {each["label"]: each["score"] for each in json.loads(result.stdout)["predictions"][0]["labels"]}
    assert {name for name, score in found.items() if score > 0.5} == {"good", "nice"}


def test_numbers_are_learnt(encoder: Path, tmp_path: Path) -> None:
    given = [{**row, "label": 1.5 if row["label"] == "good!" else -0.5} for row in rows("classify")]
    data = write(tmp_path / "train.jsonl", given)
    words = (
        "train",
        "classify",
        "--train",
        data,
        "--dev",
        data,
        "--model",
        encoder,
        "--out",
        tmp_path / "out",
    )
    code, out, err = invoke(*words, *QUICK, "--train.max_epochs=15", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert (report["labels"], report["best"]["figure"]) == (None, "mse")
    assert report["metrics"]["mse"] == pytest.approx(report["best"]["loss"])
    result = CliRunner().invoke(
        cli.app, ["predict", str(tmp_path / "out"), "--json"], input="good film\nbad film\n"
    )
    good, bad = (each["labels"][0]["score"] for each in json.loads(result.stdout)["predictions"])
    assert good > 1.0 > 0.0 > bad


def test_the_options_of_a_run_repeat_it(runs: Any, encoder: Path, tmp_path: Path) -> None:
    out, report = runs["classify"]
    data = out.parent / "train.jsonl"
    words = (
        "train",
        "classify",
        "--train",
        data,
        "--dev",
        data,
        "--model",
        encoder,
        "--out",
        tmp_path / "again",
    )
    code, again, err = invoke(*words, f"--config={out / 'run.yaml'}", "--json")
    assert code == 0, err
    assert json.loads(again)["metrics"] == report["metrics"]
    first, second = (families.load(folder).state_dict() for folder in (out, tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    sections = load_config({"data": DataConfig, "lora": LoraConfig}, overrides=["--lora.r=4"])
    assert (sections["data"], sections["lora"].r) == (DataConfig(), 4)
    for word, columns in (
        ("label=Topic (main)", ("label=Topic (main)",)),
        ("[label=Topic (main), text=(a) b (c)]", ("label=Topic (main)", "text=(a) b (c)")),
        ("(label=topic, text=body)", ("label=topic", "text=body")),
    ):
        given = load_config({"data": DataConfig}, overrides=[f"--data.columns={word}"])
        assert given["data"].columns == columns


def test_a_stopped_run_goes_on(runs: Any, encoder: Path, tmp_path: Path) -> None:
    """Two parts end with the bits of one run."""
    out, report = runs["classify"]
    data = out.parent / "train.jsonl"
    words = ("train", "classify", "--train", data, "--model", encoder, "--out", tmp_path / "out")
    options = (*QUICK, "--dev", data, "--train.schedule=constant", "--train.warmup_steps=2")
    steps = report["steps"]
    assert invoke(*words[:-1], tmp_path / "whole", *options)[0] == 0
    assert invoke(*words, *options, "--train.max_steps=4")[0] == 0
    code, text, err = invoke(*words, *options, "--resume=auto")
    assert code == 0, err
    assert "resumed at step 4" in text
    ends = (tmp_path / name / f"checkpoint-{steps}" for name in ("whole", "out"))
    first, second = (families.load(folder).state_dict() for folder in ends)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_resumes_with_its_labels_tokens_and_examples_alone(encoder: Path, tmp_path: Path) -> None:
    """Rows of the same number whose labels, texts, tokens or task are others would change what the weights mean."""
    given = rows("classify")
    data = write(tmp_path / "data.jsonl", given)
    words = ("--model", encoder, "--out", tmp_path / "out", "--train.device=cpu")
    code, _, err = invoke("train", "classify", "--train", data, "--dev", data, *words, "--train.max_steps=2")
    assert code == 0, err
    before = (tmp_path / "out" / "report.json").read_bytes()
    renamed = [{**row, "label": {"good!": "very good", "bad!": "awful"}[row["label"]]} for row in given]
    swapped = [{**row, "label": {"good!": "bad!", "bad!": "good!"}[row["label"]]} for row in given]
    texts = [{**given[0], "text": "so so"}, *given[1:]]
    other = tmp_path / "other"
    shutil.copytree(encoder, other)
    vocabulary = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(vocabulary.replace('"river"', '"rivers"'))
    again = ("--resume=auto", "--train.max_steps=3", "--dev", data)
    for complaint, task, changed, more in (
        ("labels: ", "classify", renamed, ()),
        ("--train: ", "classify", swapped, ()),
        ("--train: ", "classify", texts, ()),
        ("tokenizer: ", "classify", given, (f"--data.tokenizer={other}",)),
        ("TASK: ", "embed", [{"text": row["text"], "positive": row["label"]} for row in given], ()),
    ):
        file = write(tmp_path / "changed.jsonl", changed)
        dev = ("--dev", file) if task == "embed" or complaint == "labels: " else ()
        code, _, err = invoke(
            "train", task, "--train", file, *words, *(again[:2] if dev else again), *dev, *more
        )
        assert code == 2, (complaint, task)
        assert err.startswith(f"fastattn: {complaint}{tmp_path / 'out' / 'checkpoint-2'} was trained with"), (
            err
        )
    assert (tmp_path / "out" / "report.json").read_bytes() == before
    # the same rows in another file, and an option of the task, which a line names
    moved = write(tmp_path / "moved.jsonl", given)
    code, text, err = invoke("train", "classify", "--train", moved, *words, *again, "--task.max_length=16")
    assert code == 0, err
    assert f"WARNING: task.max_length: {tmp_path / 'out' / 'checkpoint-2'} was trained with None" in text


def test_held_out_examples_are_announced(encoder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "train.jsonl", rows("classify"))
    words = ("train", "classify", "--train", data, "--model", encoder, *QUICK, "--train.max_steps", 1)
    code, text, _ = invoke(*words, "--out", tmp_path / "a")
    assert code == 0
    assert "no --dev: 2 examples are held out of the training data, 22 train (seed 0)" in text
    dev = write(tmp_path / "dev.jsonl", rows("classify")[::4])
    code, text, _ = invoke(*words, "--out", tmp_path / "b", "--dev", dev)
    assert code == 0
    assert "no --dev" not in text
    assert json.loads((tmp_path / "b" / "report.json").read_text())["dev"]["examples"] == 6


def test_what_was_cleaned_is_counted(encoder: Path, tmp_path: Path) -> None:
    dirty = [*rows("embed"), rows("embed")[0], {"text": "a", "positive": "b"}]
    data, dev = write(tmp_path / "train.jsonl", dirty), write(tmp_path / "dev.jsonl", dirty[:6])
    words = ("train", "embed", "--train", data, "--dev", dev, "--model", encoder, "--out", tmp_path / "out")
    words = (*words, *QUICK, "--train.max_steps=1", "--clean.exact_duplicates=true", "--clean.min_chars=3")
    words = (*words, "--task.max_length=3")
    code, text, err = invoke(*words)
    assert code == 0, err
    assert "clean.exact_duplicates: 1 examples" in text
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["cleaning"] == {"min_chars": 1, "exact_duplicates": 1}
    assert report["train"]["examples"] == len(dirty) - 2
    assert report["cut_texts"] > report["dev"]["cut_texts"] > 0
    assert f"{report['dev']['cut_texts']} dev texts are longer than the model's limit" in text


@pytest.mark.parametrize("task", ENCODER_TASKS)
def test_adapters_leave_the_base_as_it_was(task: str, encoder: Path, tmp_path: Path) -> None:
    """Every weight that the folder had is bitwise the same in the checkpoint; the merged folder predicts."""
    data = write(tmp_path / f"train.{SUFFIX.get(task, 'jsonl')}", rows(task))
    inputs = work.Inputs(
        task, (str(data),), (), str(encoder), str(tmp_path / "out"),
        overrides=(*QUICK, "--train.max_steps=6", "--lora.r=4"),
    )  # fmt: skip
    prepared = work.prepare(inputs)
    before = {name: value.clone() for name, value in prepared.model.state_dict().items()}
    trained = {name for name, p in prepared.model.named_parameters() if p.requires_grad}
    assert any(".lora." in name for name in trained)
    from fastattn.train.progress import NoDisplay

    report = work.fit(prepared, display=NoDisplay())
    assert report["trained_parameters"] < report["parameters"]
    again = work.prepare(work.Inputs(**{**vars(inputs), "out": str(tmp_path / "other")})).model
    read_model(again, tmp_path / "out" / "checkpoint-6")
    after = again.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert changed <= trained
    assert {name for name in trained if ".lora." in name and "lora_A" not in name} <= changed
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert {"masked-lm": "fill"}.get(task, task) == predicting.task_of(tmp_path / "out").NAME
    merged = families.load(tmp_path / "out").state_dict()
    assert not any("lora" in name for name in merged)


def test_soft_labels_come_from_the_teacher(runs: Any, encoder: Path, tmp_path: Path) -> None:
    """With the whole weight on the teacher, wrong labels do no harm."""
    teacher, _ = runs["classify"]
    wrong = [
        {**row, "label": "good!" if number % 2 else "bad!"} for number, row in enumerate(rows("classify"))
    ]
    data, dev = write(tmp_path / "train.jsonl", wrong), write(tmp_path / "dev.jsonl", rows("classify"))
    words = ("train", "classify", "--train", data, "--model", encoder, "--out", tmp_path / "out", *QUICK)
    code, _, err = invoke(
        *words, f"--teacher={teacher}", f"--dev={dev}", "--task.distill_weight=1.0", "--train.max_epochs=20"
    )
    assert code == 0, err
    model, tokenizer = predicting.load_folder(tmp_path / "out", predicting.classify)
    right = rows("classify")
    found = predicting.classify.predict(model, tokenizer, right)
    assert [each["labels"][0]["label"] for each in found].count("good!") == len(right) // 2
    assert all(each["labels"][0]["label"] == row["label"] for each, row in zip(found, right))


def test_a_preset_learns_its_tokenizer(tmp_path: Path) -> None:
    data = write(tmp_path / "train.jsonl", rows("masked-lm") * 2)
    sizes = [
        "--model.hidden_size=16", "--model.num_hidden_layers=1", "--model.num_attention_heads=2",
        "--model.intermediate_size=16", "--model.max_position_embeddings=32", "--data.vocab_size=60",
    ]  # fmt: skip
    words = (
        "train",
        "masked-lm",
        "--train",
        data,
        "--model=bert-base-uncased",
        "--out",
        tmp_path / "out",
        *QUICK,
    )
    code, _, err = invoke(
        *words, *sizes, "--train.max_steps=3", "--task.next_sentence=true", "--task.max_length=16"
    )
    assert code == 0, err
    model, tokenizer = predicting.load_folder(tmp_path / "out", predicting.fill)
    assert model.config.hidden_size == 16
    assert tokenizer.mask_id is not None
    assert tokenizer.core.encode("Anna").ids[0] == tokenizer.core.token_to_id("[CLS]")


def test_causal_lm_trains_from_a_preset_and_its_folder(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(3):
        text = "\n\n\n".join(row["text"] for row in rows("masked-lm")[number::3])
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    sizes = ["--model.n_embd=16", "--model.n_layer=1", "--model.n_head=2", "--model.n_positions=32"]
    words = ("train", "causal-lm", "--train", tmp_path / "texts", *QUICK, "--train.max_epochs=20")
    code, text, err = invoke(
        *words, "--model=gpt2", "--out", tmp_path / "out", *sizes, "--data.vocab_size=300"
    )
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["best"]["loss"] < report["first"]["loss"]
    code, text, err = invoke(*words, "--model", tmp_path / "out", "--out", tmp_path / "more", "--lora.r", 2)
    assert code == 0, err
    code, text, err = invoke("generate", tmp_path / "more", "--prompt=anna", "--max-new-tokens=3")
    assert code == 0, err


BAD: list[tuple[str, list[str], str]] = [  # task, words, complaint
    ("clasify", [], "TASK: got 'clasify', did you mean classify?"),
    ("nothing", [], "TASK: got 'nothing', needs one of"),
    ("classify", ["--train.learning_rate=1"], "option 'learning_rate' is unknown"),
    ("classify", ["--train.lr=high"], "--train.lr: got 'high', needs a number"),
    ("classify", ["--train.lr"], "--train.lr: needs a value"),
    ("classify", ["--nothing.lr=1"], "section 'nothing' is unknown"),
    ("classify", ["--task.max_length=0"], "max_length: got 0, needs a positive integer"),
    ("classify", ["--task.max_length=41"], "task.max_length: got 41, the model has 40 positions"),
    ("classify", ["--task.kind=many"], "kind: got 'many', needs one of"),
    ("classify", ["--model.hidden_size=8"], "section 'model' is unknown"),
    ("classify", ["--data.columns=label"], "data.columns: got 'label', needs FIELD=COLUMN"),
    ("classify", ["--data.columns=labels=topic"], "data.columns: 'labels' is not a field of classify"),
    ("classify", ["--data.columns=label=topic"], "line 1 has no column 'topic' for label"),
    ("classify", ["--data.tokenizer=bpe"], "data.tokenizer: got 'bpe', needs a preset, because a model's folder"),
    ("classify", ["--data.tokenizer=/nowhere"], "data.tokenizer: got '/nowhere', needs a folder"),
    ("classify", ["--lora.r=0"], "lora.r: got 0, needs at least 1"),
    ("classify", ["--lora.alpha=64"], "lora.alpha: has no effect in this run, needs lora.r"),
    ("classify", ["--lora.dropout=0.1"], "lora.dropout: has no effect in this run, needs lora.r"),
    ("tag", ["--lora.targets=query"], "lora.targets: has no effect in this run, needs lora.r"),
    ("classify", ["--lora.r=2", "--model=minilm-l6"], "lora.r: has no effect in this run, needs the folder of a"),
    ("classify", ["--data.vocab_size=50"], "data.vocab_size: has no effect in this run, needs a preset whose"),
    ("classify", ["--data.lowercase=false"], "data.lowercase: has no effect in this run, needs a preset whose"),
    ("causal-lm", ["--model=nano", "--data.lowercase=true"], "data.lowercase: has no effect in this run"),
    ("classify", ["--task.distill_weight=0.5"], "task.distill_weight: has no effect in this run, needs --teacher"),
    ("qa", ["--task.temperature=3"], "task.temperature: has no effect in this run, needs --teacher"),
    ("classify", ["--train.muon_lr=1"], "train.muon_lr: has no effect in this run, needs train.optimizer=muon"),
    ("classify", ["--train.decay_ratio=0.3"], "train.decay_ratio: has no effect in this run, needs train.sch"),
    ("classify", ["--train.max_nonfinite=3"], "train.max_nonfinite: has no effect in this run, needs train.on"),
    ("classify", ["--dev={one}", "--data.dev_fraction=0.3"], "data.dev_fraction: has no effect in this run"),
    ("classify", ["--config={idle}"], "lora.alpha: has no effect in this run, needs lora.r"),
    ("classify", ["--lora.r=2", "--lora.targets=nothing"], "targets: 'nothing' names no linear layer"),
    ("classify", ["--clean.near_duplicates=2"], "near_duplicates: got 2"),
    ("classify", ["--clean.min_chars=100000"], "clean: dropped every example"),
    ("qa", ["--clean.control=true"], "clean.control: changes texts, but the labels of this task are positions"),
    ("embed", ["--teacher=x"], "--teacher: the task embed does not support it; "),
    ("tag", ["--teacher={encoder}"], "holds a Bert, needs a BertForTokenClassification"),
    ("classify", ["--task.max_length=2"], "task.max_length: got 2, of which 2 are special tokens"),
    ("classify", ["--teacher={encoder}"], "holds a Bert, needs a BertForSequenceClassification"),
    ("classify", ["--teacher={strange}"], "--teacher: its labels differ from the data's, as 'LABEL_0'"),
    ("classify", ["--train.device=nowhere"], "device: 'nowhere' is not available"),
    ("classify", ["--config=/nowhere.yaml"], "/nowhere.yaml: cannot be read"),
    ("classify", ["--resume=/nowhere"], "resume: /nowhere is not a checkpoint"),
    ("classify", ["extra"], "'extra': is one word too many"),
    ("embed", ["--train.batch_size=1"], "train.batch_size: got 1, embed needs at least 2 for these examples"),
    ("causal-lm", [], "holds a Bert, causal-lm needs a decoder"),
    ("seq2seq", ["--task.bleu_tokenizer=zhh"], "bleu_tokenizer: got 'zhh', needs one of "),
    ("masked-lm", ["--task.next_sentence=true", "--train={one}", "--dev={one}"], "--train: holds 1 document, "),
    ("classify", ["--dev={unknown}"], "unknown.jsonl: line 1: label 'other' is in no training example"),
    ("classify", ["--train=/nowhere.jsonl"], "/nowhere.jsonl: no such file"),
    ("classify", ["--train={latin}"], "latin.jsonl: line 1 is not UTF-8"),
    ("classify", ["--train={empty}"], "empty.jsonl: holds no example"),
    ("classify", ["--model=/nowhere"], "--model: "),
    ("classify", ["--model={other}"], "tokenizer: has ids up to 34, the model's vocab_size is 20"),
    ("classify", ["--model={bare}"], "holds neither tokenizer.json nor vocab.txt"),
    ("classify", ["--out={file}"], "is a file, needs a directory"),
]  # fmt: skip


@pytest.fixture(scope="module")
def places(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files and folders that are named in bad input."""
    place = tmp_path_factory.mktemp("places")
    paths = {name: place / f"{name}.jsonl" for name in ("unknown", "latin", "empty", "one", "file")}
    write(paths["unknown"], [{"text": "a", "label": "other"}])
    write(paths["one"], [{"text": "anna. maria. paris. berlin."}])
    paths["latin"].write_bytes(b'{"text": "\xe9", "label": "a"}')
    paths["empty"].write_text("")
    paths["file"].write_text("")
    paths["encoder"] = encoder
    paths["idle"] = place / "idle.yaml"
    paths["idle"].write_text("lora: {alpha: 64.0, dropout: 0.0}\ntask: {temperature: 2.0}\n")
    paths["strange"] = save_encoder(place / "strange", "ForSequenceClassification", num_labels=2)
    paths["other"] = save_encoder(place / "other")
    import task_cases

    task_cases.save_model(place / "bare", "Model", vocab_size=35)
    for file in (place / "bare").glob("tokenizer*"):
        file.unlink()
    paths["bare"] = place / "bare"
    theirs = training_cases.task_cases.encoder_models.theirs("bert", "Model", vocab_size=20)
    theirs.save_pretrained(paths["other"])
    return paths


@pytest.mark.parametrize(
    ("task", "words", "complaint"), BAD, ids=[f"{task} {' '.join(w)}" for task, w, _ in BAD]
)
def test_bad_input_is_named_in_one_line_before_any_work(
    task: str, words: list[str], complaint: str, places: dict[str, Path], tmp_path: Path
) -> None:
    data = tmp_path / f"train.{SUFFIX.get(task, 'jsonl')}"
    if task in training_cases.ENCODER_TASKS:
        write(data, rows(task))
    else:
        write(data, rows("classify"))
    words = [word.format(**places) for word in words]
    given = ["train", task, *(() if any(w.startswith("--train=") for w in words) else ("--train", data))]
    for name, value in (("--model", places["encoder"]), ("--out", tmp_path / "out")):
        given += [] if any(word.startswith(f"{name}=") for word in words) else [f"{name}={value}"]
    code, out, err = invoke(*given, *words)
    assert (code, out) == (2, ""), err
    assert err.startswith("fastattn: "), err
    assert complaint in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_patience_counts_the_evaluations_of_epochs_and_of_shorter_runs(encoder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "train.jsonl", rows("classify"))
    given = work.Inputs("classify", (str(data),), (str(data),), str(encoder), str(tmp_path / "out"))
    config = work.prepare(dataclasses.replace(given, overrides=("--train.patience=2",))).sections.train
    assert (config.patience, config.eval_every, config.save_every) == (2, 2, 2)
    for limit, every in (
        ("max_epochs=1", 3),  # of at most one epoch: five in the run
        ("max_steps=9", 2),
        ("max_steps=2", 1),
        ("max_epochs=2", 12),
        ("max_seconds=60", 12),  # of the task's epochs, if the time lasts
    ):
        words = (f"--train.{limit}", "--train.batch_size=2")
        config = work.prepare(dataclasses.replace(given, overrides=words)).sections.train
        assert (config.eval_every, config.save_every) == (every, every), limit
        assert (config.warmup_steps is None) == ("seconds" in limit), limit
    with pytest.raises(work.ConfigError, match=r"^patience: needs eval_every"):
        work.prepare(dataclasses.replace(given, overrides=("--train.patience=2", "--train.eval_every=none")))


def test_what_only_a_step_shows_is_one_line_too(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("input_ids: got 9 tokens,\n  needs 8")

    monkeypatch.setattr(work.Trainer, "fit", refuse)
    data = write(tmp_path / "train.jsonl", rows("classify"))
    words = ("train", "classify", "--train", data, "--model", encoder, "--out", tmp_path / "out")
    assert invoke(*words, "--train.device=cpu")[::2] == (2, "fastattn: input_ids: got 9 tokens, needs 8\n")


def test_one_class_is_refused(encoder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "train.jsonl", [{"text": f"{i}", "label": "a"} for i in range(9)])
    code, _, err = invoke("train", "classify", "--train", data, "--model", encoder, "--out", tmp_path / "out")
    assert code == 2
    assert err == "fastattn: data: all 8 examples have the label 'a', needs two labels\n"


def test_an_earlier_run_is_not_overwritten(runs: Any, encoder: Path) -> None:
    out, _ = runs["classify"]
    data = out.parent / "train.jsonl"
    code, _, err = invoke("train", "classify", "--train", data, "--model", encoder, "--out", out)
    assert code == 2
    assert "already holds a run" in err


def test_a_full_disk_is_named(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import collections
    import shutil

    usage = collections.namedtuple("usage", "total used free")(100, 99, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    data = write(tmp_path / "train.jsonl", rows("classify"))
    code, _, err = invoke("train", "classify", "--train", data, "--model", encoder, "--out", tmp_path / "out")
    assert code == 2
    assert "GB free, need" in err


def test_a_resumed_run_keeps_the_tokenizer_of_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "data.jsonl", rows("classify"))
    line = ["classify", "--train", str(data), "--model", "minilm-l6", "--out", str(tmp_path / "run")]
    line += [
        "--model.num_hidden_layers=1",
        "--model.hidden_size=48",
        "--data.vocab_size=60",
        "--resume",
        "auto",
    ]
    first = CliRunner().invoke(cli.app, ["train", *line, "--train.max_steps=1", "--train.device=cpu"])
    assert first.exit_code == 0, first.output
    kept = (tmp_path / "run" / "tokenizer.json").read_bytes()

    def other(*_: object, **__: object) -> None:
        raise AssertionError("a tokenizer was learnt anew")

    monkeypatch.setattr(tokenizing, "train_input_tokenizer", other)
    second = CliRunner().invoke(cli.app, ["train", *line, "--train.max_steps=2", "--train.device=cpu"])
    assert second.exit_code == 0, second.output
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == kept


def test_the_same_text_gives_the_same_wordpiece() -> None:
    texts = [f"{a}{b}{c} unlikely, {c}{a}" for a in "abcdefgh" for b in "ijklmn" for c in "opqrst"]
    learnt = [train_input_tokenizer("wordpiece", iter(texts), 120).core.to_str() for _ in range(4)]
    assert len(set(learnt)) == 1
    assert "##" not in json.dumps(json.loads(learnt[0])["added_tokens"])


@pytest.mark.parametrize(("kind", "least"), [("wordpiece", 5 + 6 + 4), ("bpe", 5 + 256)])
def test_a_vocabulary_that_is_too_small_is_refused(kind: str, least: int) -> None:
    """No tokenizer has more tokens than were asked for, and a size that all characters take is enough."""
    assert train_input_tokenizer(kind, ["abcd ef"], least).core.get_vocab_size() <= least
    with pytest.raises(ValueError, match=rf"vocab_size: got {least - 1}, needs at least {least} for special"):
        train_input_tokenizer(kind, ["abcd ef"], least - 1)


def test_overwrite_does_not_delete_the_model_it_starts_from(encoder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", rows("classify"))
    before = {path.name: path.read_bytes() for path in encoder.iterdir() if path.is_file()}
    words = ["classify", "--train", str(data), "--model", str(encoder), "--out", str(encoder)]
    result = CliRunner().invoke(cli.app, ["train", *words, "--train.overwrite=true"])
    assert result.exit_code == 2
    assert "--out" in result.output
    assert "--model" in result.output
    assert {path.name: path.read_bytes() for path in encoder.iterdir() if path.is_file()} == before


def test_a_run_with_adapters_that_has_ended_resumes_to_the_same_files(encoder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", rows("classify"))
    words = ["classify", "--train", str(data), "--model", str(encoder), "--out", str(tmp_path / "run")]
    words += ["--lora.r=2", "--train.max_steps=2", "--train.device=cpu", "--resume", "auto"]
    found = []
    for _ in range(2):
        result = CliRunner().invoke(cli.app, ["train", *words])
        assert result.exit_code == 0, result.output
        names = ("model.safetensors", "config.json", "adapter/adapter_model.safetensors")
        found.append([(tmp_path / "run" / name).read_bytes() for name in names])
    assert found[0] == found[1]
