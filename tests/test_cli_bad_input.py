"""Every option of every command: a value that no run could use is an error that names it, never a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from fastattn import bench, cli, demo, text_generation
from fastattn.extension import build
from fastattn.models import BertForSequenceClassification
from fastattn.serve import served
from fastattn.tasks import classify, evaluate, predict
from fastattn.tune import command as tuning

NUMBERS = ("x", "", "-1", "1.5", "nan", "inf", "1" + "0" * 20, "1" + "0" * 5000, "True", "None")
LONG = "x" * 5000
# (command, option) -> values that no run could use. Flags take none.
HOSTILE: dict[tuple[str, str], tuple[str, ...]] = {
    ("demo", "--text"): ("", LONG, "/nowhere/at/all", "/proc/self/mem", "/dev/null"),
    ("demo", "--out"): (LONG, "/nowhere/at/all", "/dev/null", "/dev/null/x"),
    ("demo", "--seed"): NUMBERS,
    ("demo", "--steps"): (*NUMBERS, "0"),
    ("build", "--arch"): ("x", "Hopper", "9", "9.0b", "nan", "-1", "1" + "0" * 5000, "9.0;x"),
    ("generate", "--prompt"): ("", "\0", "a\0b"),
    ("generate", "--data"): ("", LONG, "/nowhere/at/all", "/dev/null", "/proc/self/mem", "/dev"),
    ("generate", "--max-new-tokens"): NUMBERS,
    ("generate", "--temperature"): ("x", "", "-1", "nan", "inf", "1e400", "None"),
    ("generate", "--top-k"): NUMBERS,
    ("generate", "--top-p"): ("x", "", "-1", "0", "1.5", "nan", "inf", "None"),
    ("generate", "--min-p"): ("x", "", "-1", "1.5", "nan", "inf", "None"),
    ("generate", "--repetition-penalty"): ("x", "", "-1", "0", "nan", "inf", "1e400", "None"),
    ("generate", "--presence-penalty"): ("x", "", "nan", "inf", "-inf", "1e400", "None"),
    ("generate", "--no-repeat-ngram-size"): NUMBERS,
    ("generate", "--min-new-tokens"): NUMBERS,
    ("generate", "--num-beams"): (*NUMBERS, "0", "100000"),
    ("generate", "--stop"): ("",),
    ("generate", "--prompt-lookup"): (*NUMBERS, "100000"),
    ("generate", "--seed"): NUMBERS,
    ("generate", "--target-tokenizer"): (LONG, "/nowhere/at/all", "/dev/null"),
    ("predict", "--data"): ("", LONG, "/nowhere/at/all", "/dev/null", "/proc/self/mem", "/dev"),
    ("predict", "--batch-size"): (*NUMBERS, "0"),
    ("predict", "--top-k"): (*NUMBERS, "0"),
    ("serve", "--host"): ("", "x y", "300.1.1.1", "\0", LONG),
    ("serve", "--port"): ("x", "", "-1", "65536", "1.5", "nan", "None"),
    ("serve", "--device"): ("", "x", "cpu:x", "meta", LONG),
    ("serve", "--dtype"): ("", "x", "float64", "int8", "load", LONG),
    ("serve", "--max-batch"): (*NUMBERS, "0", "100000"),
    ("serve", "--max-queue"): (*NUMBERS, "0"),
    ("serve", "--max-tokens"): (*NUMBERS, "0"),
    ("serve", "--kv-memory"): (*NUMBERS, "0"),
    ("serve", "--page-size"): (*NUMBERS, "0", "100000"),
    ("serve", "--api-key"): ("", " ", "a\nb", "a b\0", "\N{SNOWMAN}"),
    ("serve", "--allowed-host"): ("", " ", "a:80", "http://a", "a/b", "[::1]", "a\0", "\N{SNOWMAN}", LONG),
    ("evaluate", "--data"): ("", LONG, "/nowhere/at/all", "/dev/null", "/proc/self/mem", "/dev"),
    ("evaluate", "--task"): ("", "x", "classify,tag", LONG),
    ("evaluate", "--baseline"): ("", "x", "lead", "tfidf", LONG),  # the last two without --train
    ("evaluate", "--train"): ("", LONG, "/nowhere/at/all", "/dev/null", "/proc/self/mem", "/dev"),
    ("evaluate", "--column"): ("", "x", "=x", "label=", LONG),
    ("evaluate", "--option"): (
        "",
        "x",
        "x=1",
        "max_length=-1",
        "max_length=",
        "max_length=nan",
        "kind=x",
        LONG,
    ),
    ("evaluate", "--batch-size"): (*NUMBERS, "0"),
    ("evaluate", "--plots"): ("/dev/null", "/dev/null/x", LONG),
    ("train", "--train"): ("", LONG, "/nowhere.jsonl", "/dev/null", "/proc/self/mem", "hf:", "a\0.jsonl"),
    ("train", "--dev"): ("", LONG, "/nowhere.jsonl", "/dev/null", "/proc/self/mem", "hf:", "a\0.jsonl"),
    ("train", "--model"): ("", LONG, "/nowhere/at/all", "/dev/null", "a\0b"),
    ("train", "--out"): ("", LONG, "/dev/null", "/dev/null/x", "a\0b"),
    ("train", "--teacher"): ("", LONG, "/nowhere/at/all", "/dev/null"),
    ("train", "--resume"): ("", LONG, "/nowhere/at/all", "/dev/null"),
    ("train", "--config"): ("", LONG, "/nowhere/at/all", "/dev", "/proc/self/mem"),
    ("bench tune", "--dtype"): ("", "x", "float64", "int8", LONG),
    ("bench tune", "--head-dim"): (
        "",
        "x",
        "0",
        "-1",
        "257",
        "1.5",
        "64,",
        "64,64,64",
        "nan",
        "1" + "0" * 5000,
        "\N{SUPERSCRIPT TWO}",
    ),
    ("bench tune", "--features"): ("", "x", "causal+", "causal+x", "+", LONG),
    ("bench tune", "--kernel"): ("", "x", "forwards", LONG),
    ("bench tune", "--minutes"): ("x", "", "-1", "nan", "inf", "1e400", "None"),
    ("bench tune", "--jobs"): (*NUMBERS, "0", "100000"),
    ("bench tune", "--arch"): (*NUMBERS, "0", "79", "100000"),
    ("bench tune", "--device"): ("", "x", LONG),  # without --model --store
    ("bench model", "--head-dim"): (*NUMBERS, "0", "48", "512"),
    ("bench model", "--direction"): ("", "x", "backwards", LONG),
    ("bench model", "--backend"): ("", "x", "torch", LONG),
    ("bench model", "--features"): ("", "x", "causal+", "causal+x", LONG),
    ("bench model", "--cubin"): ("", "/nowhere/at/all", "/dev", "/dev/null", LONG),
    ("bench model", "--function"): ("x", LONG),  # without --cubin, like the next
    ("bench model", "--rows"): (*NUMBERS, "0", "15", "16", "1025"),
}
ALWAYS: dict[str, tuple[str, ...]] = {
    "bench tune": ("--dry-run",),  # what makes the command list, not measure
    "generate": ("folder", "--prompt=text"),
    "predict": ("folder",),
    "serve": (".",),
    "evaluate": ("folder", "--data=data.jsonl"),
    "train": ("classify", "--train=data.jsonl", "--model=minilm-l6", "--out=out"),
}


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for name, each in group.commands.items():
        if hasattr(each, "commands"):
            yield from commands(each, (*path, name))
        else:
            yield " ".join((*path, name)), each


COMMANDS = dict(commands(typer.main.get_command(cli.app)))


def valued_options() -> Iterator[tuple[str, str]]:
    for name, each in COMMANDS.items():
        for parameter in each.params:
            long = [option for option in parameter.opts if option.startswith("--")]
            if not getattr(parameter, "is_flag", False) and long:
                yield name, long[0]


def test_every_option_has_its_hostile_values() -> None:
    assert set(valued_options()) == HOSTILE.keys()
    assert COMMANDS.keys() == {
        "doctor",
        "demo",
        "build",
        "generate",
        "predict",
        "serve",
        "evaluate",
        "train",
        "bench tune",
        "bench model",
        *(f"bench {n}" for n in [*bench.NAMES, "all"]),
    }


@pytest.mark.parametrize(("name", "option"), HOSTILE, ids=[" ".join(key) for key in HOSTILE])
def test_a_value_that_means_nothing_is_named(
    name: str, option: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    def work(*args: Any, **options: Any) -> Any:
        raise AssertionError("worked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "_tokens", work)
    monkeypatch.setattr(demo, "_show_grid", work)
    monkeypatch.setattr(build, "build", work, raising=False)
    monkeypatch.setattr(tuning, "tune", work)
    monkeypatch.setattr(text_generation, "check_folder", lambda folder: None)
    monkeypatch.setattr(text_generation, "load_folder", work)
    monkeypatch.setattr(predict, "task_of", lambda folder: classify)
    monkeypatch.setattr(predict, "load_folder", work)
    monkeypatch.setattr(evaluate, "check_folder", lambda folder: None)
    monkeypatch.setattr(evaluate.families, "class_for", lambda folder: BertForSequenceClassification)
    monkeypatch.setattr(evaluate, "load_folder", work)
    monkeypatch.setattr(served, "load_all", work)
    for value in HOSTILE[name, option]:
        words = [*name.split(), *ALWAYS.get(name, ()), f"{option}={value}"]
        result = CliRunner().invoke(cli.app, words)
        where = (value[:20], result.output[-300:])
        assert isinstance(result.exception, SystemExit), (*where, result.exception)
        assert result.exit_code in (1, 2), where
        assert result.stdout == "", where
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith(("fastattn: ", "Error: ")), where
    assert list(tmp_path.iterdir()) == []


# a bench's options are its script's, tested there
@pytest.mark.parametrize(
    "name", [name for name in COMMANDS if not name.startswith("bench ") or name in ALWAYS]
)
@pytest.mark.parametrize("words", [["--nonsense"], ["nonsense"]])
def test_unknown_words_are_refused(name: str, words: list[str]) -> None:
    result = CliRunner().invoke(cli.app, [*name.split(), *words])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert words[0] in result.stderr
