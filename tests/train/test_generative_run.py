"""`fastattn train` for language models, chats, preferences, teachers and encoder-decoders: from files to a folder."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fastattn import cli
from fastattn.data import Tokenizer
from fastattn.models import EncoderDecoder, load

TEXTS = [
    f"{who} {does} {what}."
    for who, does, what in product(("Anna", "Ben"), ("has", "sees"), ("a cat", "a dog"))
]
CHATS = [{"prompt": f"Say {word}", "completion": word} for word in ("one", "two", "six", "ten")]
PAIRS = [{"prompt": f"Say {w}", "chosen": w, "rejected": f"{w} {w}"} for w in ("one", "two", "six", "ten")]
TRANSLATIONS = [{"source": text, "target": text.upper()} for text in TEXTS]
SMALL = ("--model.n_embd=32", "--model.n_layer=2", "--model.n_positions=64", "--train.warmup_steps=0")


def write(path: Path, entries: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def train(task: str, data: Path, model: Any, out: Path, *words: str) -> dict[str, Any]:
    given = ["train", task, "--train", data, "--dev", data, "--model", model, "--out", out, "--json"]
    given += [
        "--train.max_epochs=1000",
        "--train.eval_every=1000",
        "--train.save_every=1000",
        *words,
    ]  # steps end it
    result = CliRunner().invoke(cli.app, [str(word) for word in given])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 0, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def refused(task: str, data: Path, model: Any, out: Path, *words: str) -> str:
    given = ["train", task, "--train", data, "--dev", data, "--model", model, "--out", out, *words]
    result = CliRunner().invoke(cli.app, [str(word) for word in given])
    assert isinstance(result.exception, SystemExit), result.exception
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    assert not out.exists()
    return result.stderr


@pytest.fixture(scope="module")
def small_gpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model trained from text."""
    folder = tmp_path_factory.mktemp("run")
    texts = [*TEXTS, *(f"User: {c['prompt']}\nAssistant: {c['completion']}" for c in CHATS)]
    data = write(folder / "text.jsonl", [{"text": text} for text in texts])
    words = ("--data.tokenizer=characters", "--train.max_steps=40", "--train.batch_size=4", "--train.lr=5e-3")
    report = train("causal-lm", data, "nano", folder / "out", *SMALL, *words)
    assert report["metrics"]["loss"] < 1.5  # a uniform guess among its characters has over 3
    assert report["metrics"]["unknown"] == 0
    return folder / "out"


def test_a_teacher_is_learnt_from(small_gpt: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "text.jsonl", [{"text": text} for text in TEXTS])
    words = ("--data.tokenizer", str(small_gpt), "--train.max_steps=3", "--train.lr=1e-3", *SMALL)
    losses = {}
    for weight in (0.0, 1.0):
        out = tmp_path / f"{weight}"
        options = (*words, "--teacher", str(small_gpt), f"--task.distill_weight={weight}")
        train("causal-lm", data, "nano", out, *options)
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        losses[weight] = [entry["loss"] for entry in log if entry["event"] == "train"]
    assert losses[0.0] != losses[1.0]
    pairs = write(tmp_path / "pairs.jsonl", PAIRS)
    assert "does not support it" in refused(
        "dpo", pairs, small_gpt, tmp_path / "x", "--teacher", str(small_gpt)
    )


def test_a_chat_learns_to_stop_and_preferences_are_followed(small_gpt: Path, tmp_path: Path) -> None:
    chats = write(tmp_path / "chats.jsonl", CHATS)
    words = ("--train.max_steps=60", "--train.lr=5e-3", "--train.warmup_steps=0")
    report = train("chat", chats, small_gpt, tmp_path / "chat", *words)
    assert report["metrics"]["end_accuracy"] == 1.0
    assert (tmp_path / "chat" / "chat_template.jinja").is_file()
    log = [json.loads(line) for line in (tmp_path / "chat" / "log.jsonl").read_text().splitlines()]
    assert [entry["text"] for entry in log if entry["event"] == "sample"][-1] == "Say one -> one"
    model, tokenizer = load(tmp_path / "chat"), Tokenizer.from_pretrained(tmp_path / "chat")
    prompt = tokenizer.encode("User: Say two\nAssistant:")
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=12)[0, len(prompt) :].tolist()
    assert tokenizer.decode(ids) == " two"
    assert ids[-1] == tokenizer.eos_id

    pairs = write(tmp_path / "pairs.jsonl", PAIRS)
    report = train(
        "dpo", pairs, tmp_path / "chat", tmp_path / "dpo", *words[:1], "--train.lr=1e-3", "--lora.r=4"
    )
    assert report["metrics"]["accuracy"] == 1.0
    log = [json.loads(line) for line in (tmp_path / "dpo" / "log.jsonl").read_text().splitlines()]
    shown = [entry["text"] for entry in log if entry["event"] == "sample"]
    assert len(shown) == 2
    assert all(text.startswith("Say one -> ") for text in shown)
    names = {path.name for path in (tmp_path / "dpo").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "report.json", "adapter"} <= names


def test_an_encoder_decoder_is_trained_and_evaluated(tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu")
    data = write(tmp_path / "pairs.jsonl", TRANSLATIONS)
    words = (
        "--model.hidden_size=32",
        "--model.num_hidden_layers=1",
        "--model.num_attention_heads=4",
        "--model.intermediate_size=64",
    )
    report = train(
        "seq2seq", data, "minilm-l6", tmp_path / "out", *words, "--data.vocab_size=80", "--train.max_steps=150",
        "--train.lr=5e-3", "--train.batch_size=8", "--task.num_beams=2",
    )  # fmt: skip
    assert report["metrics"]["rouge1"] > 0.9
    assert isinstance(load(tmp_path / "out"), EncoderDecoder)
    again = train(
        "seq2seq",
        data,
        tmp_path / "out",
        tmp_path / "again",
        "--train.max_steps=1",
        "--train.lr=1e-12",
        "--lora.r=2",
    )
    assert again["metrics"]["rouge1"] == report["metrics"]["rouge1"]


def test_bad_input_is_one_line_before_any_work(small_gpt: Path, tmp_path: Path) -> None:
    chats, pairs = write(tmp_path / "chats.jsonl", CHATS), write(tmp_path / "pairs.jsonl", PAIRS)
    out = tmp_path / "out"
    assert "has no message of the assistant" in refused(
        "chat",
        write(tmp_path / "silent.jsonl", [{"messages": [{"role": "user", "content": "x"}]}]),
        small_gpt,
        out,
    )
    assert "is never a label" in refused("chat", chats, small_gpt, out, "--task.max_length=27")
    assert "has no 'chosen'" in refused("dpo", chats, small_gpt, out)
    assert "needs a decoder" in refused("dpo", pairs, _encoder(tmp_path / "encoder"), out)
    assert "dpo needs the folder of a trained model" in refused("dpo", pairs, "nano", out)
    assert "needs an encoder" in refused("seq2seq", write(tmp_path / "t.jsonl", TRANSLATIONS), small_gpt, out)
    assert "packing: got 'tight'" in refused("causal-lm", chats, small_gpt, out, "--task.packing=tight")


def _encoder(folder: Path) -> Path:
    from fastattn.models import Bert, BertConfig

    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32}
    Bert(BertConfig(vocab_size=30, **sizes)).save_pretrained(folder)
    return folder
