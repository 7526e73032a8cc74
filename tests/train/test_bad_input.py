"""Hostile values for every training option and argument of the trainer, and every way a checkpoint can be damaged."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_lm import TinyLM, make_data, make_model

from fastattn.models import GPT, GPTConfig
from fastattn.train import ConfigError, TrainConfig, Trainer, plot_loss
from fastattn.train.log import read_log
from fastattn.train.resume import FILES
from fastattn.train.state import TrainState

HOSTILE: dict[str, Any] = {
    "None": None,
    "True": True,
    "False": False,
    "-1": -1,
    "0": 0,
    "1.5": 1.5,
    "-0.5": -0.5,
    "nan": math.nan,
    "inf": math.inf,
    "huge": 10**30,
    "vast": 10**400,
    "text": "x",
    "empty": "",
    "zero byte": "a\0b",
    "nan in text": "nan",
    "bytes": b"x",
    "list": [],
    "dict": {},
    "object": object(),
}
# The hostile values that an option takes because they mean something there; all others are refused by its name.
NUMBER, OPTIONAL, FLAG = {"1.5", "huge"}, {"None"}, {"True", "False"}
TAKES: dict[str, set[str]] = {
    "output_dir": {"text", "zero byte", "nan in text"},
    "resume": {"text", "zero byte", "nan in text"},
    "device": {
        "text",
        "zero byte",
        "nan in text",
    },  # whether there is such a device is the trainer's question
    "max_steps": {"None"},
    "max_epochs": OPTIONAL | NUMBER,
    "max_seconds": OPTIONAL | NUMBER,
    "batch_size": set(),
    "accumulate": set(),
    "lr": NUMBER,
    "min_lr_ratio": {"0"},
    "warmup_steps": OPTIONAL | {"0"},
    "weight_decay": NUMBER | {"0"},
    "beta1": {"0"},
    "beta2": {"0"},
    "eps": NUMBER,
    "grad_clip": OPTIONAL | NUMBER,
    "precision": set(),
    "compile": FLAG,
    "seed": {"0"},
    "deterministic": FLAG,
    "log_every": set(),
    "eval_every": OPTIONAL,
    "eval_batches": OPTIONAL,
    "save_every": OPTIONAL,
    "save_seconds": OPTIONAL | NUMBER,
    "keep_checkpoints": set(),
    "patience": OPTIONAL,
    "on_nonfinite": set(),
    "max_nonfinite": set(),
    "overwrite": FLAG,
    "peak_tflops": OPTIONAL | NUMBER,
    "optimizer": set(),
    "schedule": set(),
    "decay_ratio": set(),
    "muon_lr": OPTIONAL | NUMBER,
    "muon_momentum": {"0"},
    "activation_checkpointing": FLAG,
    "update_in_backward": {"False"},  # True needs other options
    "ema_decay": OPTIONAL | {"0"},
    "trackers": {"list"},
    "sharding": set(),
    "loader_workers": {"0"},
}


@pytest.mark.parametrize("option", [field.name for field in dataclasses.fields(TrainConfig)])
def test_an_option_refuses_by_name_what_means_nothing(option: str) -> None:
    for kind, value in HOSTILE.items():
        options = {"output_dir": "out", "max_steps": 5, "max_epochs": 1, option: value}
        if kind in TAKES[option]:
            TrainConfig(**options)
            continue
        with pytest.raises(ConfigError, match=rf"^{option}: got "):
            TrainConfig(**options)


@pytest.mark.parametrize("argument", [n for n in inspect.signature(Trainer).parameters if n != "display"])
@pytest.mark.parametrize("value", [3, "x", object()], ids=["int", "str", "object"])
def test_the_trainer_refuses_arguments_of_another_type(argument: str, value: Any, tmp_path: Path) -> None:
    config = TrainConfig(output_dir=str(tmp_path / "run"), max_steps=1, device="cpu")
    arguments = {"model": make_model(), "config": config, "train_data": make_data(), argument: value}
    with pytest.raises(TypeError, match=f"^{argument}: got {type(value).__name__}, needs "):
        Trainer(**arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["output_dir", "resume", "device"])
def test_a_name_with_a_zero_byte_is_refused(make_trainer, option: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^{option}: "):
        make_trainer(**{"out" if option == "output_dir" else option: "a\0b"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", ["banana", "cuda:99", "meta", "cpu:x", "-1"])
def test_a_device_that_is_not_there_is_refused(make_trainer, device: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^device: "):
        make_trainer(device=device)
    assert list(tmp_path.iterdir()) == []


def cut(path: Path, share: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(folder: Path, *keys: str, value: Any = ...) -> None:
    """Set an entry of the state, or take it away."""
    state = json.loads((folder / "trainer_state.json").read_text())
    inner = state
    for key in keys[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    (folder / "trainer_state.json").write_text(json.dumps(state))


def write_state(text: str) -> Any:
    return lambda folder: (folder / "trainer_state.json").write_text(text)


DAMAGES: dict[str, tuple[Any, str]] = {  # what is done to a checkpoint -> what the message says
    **{f"no {name}": (lambda f, name=name: (f / name).unlink(), f"holds no {name}") for name in FILES},
    **{f"half of {name}": (lambda f, name=name: cut(f / name), rf"{name}: ") for name in FILES},
    **{f"empty {name}": (lambda f, name=name: cut(f / name, 0), rf"{name}: ") for name in FILES},
    **{
        f"garbage in {name}": (
            lambda f, name=name: (f / name).write_bytes(b"\xff\x00garbage" * 50),
            rf"{name}: ",
        )
        for name in FILES
    },
    **{
        f"one bit of {name}": (lambda f, name=name: flip(f / name), rf"{name}: ")
        for name in FILES
        if name != "trainer_state.json"
    },
    "a list as sums": (lambda f: edit(f, "files", value=[1]), r"trainer_state\.json: files is \[1\]"),
    "a sum of a file that is gone": (
        lambda f: edit(f, "files", "more.pt", value=[1, 2]),
        r"more\.pt: is missing",
    ),
    "a list as state": (write_state("[]"), r"trainer_state\.json: holds a list, needs a JSON object"),
    "null as state": (write_state("null"), r"trainer_state\.json: holds a NoneType"),
    "nested state": (write_state("[" * 99999), r"trainer_state\.json: is not JSON"),
    **{
        f"no {key}": (lambda f, key=key: edit(f, key), rf"trainer_state\.json: {key} is missing")
        for key in ("state", "sampler", "scaler", "config", "world_size")
    },
    **{
        f"null as {key}": (
            lambda f, key=key: edit(f, key, value=None),
            rf"trainer_state\.json: {key} is None, needs",
        )
        for key in ("state", "sampler", "scaler", "config", "world_size")
    },
    **{
        f"no state.{field.name}": (
            lambda f, name=field.name: edit(f, "state", name),
            rf"trainer_state\.json: state\.{field.name} is missing",
        )
        for field in dataclasses.fields(TrainState)
    },
    **{
        f"text as state.{field.name}": (
            lambda f, name=field.name: edit(f, "state", name, value="3"),
            rf"trainer_state\.json: state\.{field.name} is '3', needs",
        )
        for field in dataclasses.fields(TrainState)
    },
    "an unknown state": (lambda f: edit(f, "state", "more", value=1), r"state\.more is unknown"),
    "half a window": (lambda f: edit(f, "state", "window", value={"loss": 1.0}), r"state\.window is "),
    "half an evaluation": (lambda f: edit(f, "state", "best", value={"loss": 1.0}), r"state\.best is "),
    "text as consumed": (lambda f: edit(f, "sampler", "consumed", value="3"), r"sampler\.consumed is '3'"),
    "no seed": (lambda f: edit(f, "config", "seed"), r"config\.seed is missing"),
    "null as batch size": (
        lambda f: edit(f, "config", "batch_size", value=None),
        r"config\.batch_size is None",
    ),
    "another optimiser": (
        lambda f: torch.save([1], f / "optimizer.pt"),
        r"optimizer\.pt: holds no optimiser",
    ),
    "no generators": (lambda f: torch.save([], f / "generators.pt"), r"generators\.pt: needs the states"),
    "half the generators": (
        lambda f: torch.save([{"torch": 1}], f / "generators.pt"),
        r"generators\.pt: needs",
    ),
}


@pytest.fixture
def run(make_trainer):
    """A finished run with two checkpoints, of steps 2 and 4."""
    return make_trainer(max_steps=4, save_every=2).fit().checkpoint.parent


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", DAMAGES)
def test_auto_takes_the_newest_complete_checkpoint_and_says_what_it_passed_over(
    make_trainer, run: Path, kind: str
) -> None:
    damage, complaint = DAMAGES[kind]
    damage(run / "checkpoint-4")
    before = contents(run)
    with pytest.raises(ConfigError, match=complaint) as caught:
        make_trainer(max_steps=6, resume=str(run / "checkpoint-4"))
    assert str(caught.value).startswith("resume: ")
    assert str(run / "checkpoint-4") in str(caught.value)
    trainer = make_trainer(max_steps=6, resume="auto")
    assert trainer.directory.resume_from == run / "checkpoint-2"
    assert contents(run) == before
    (reason,) = trainer.directory.passed_over.values()
    assert reason in str(caught.value)


def test_a_run_goes_on_from_before_the_damage_and_keeps_good_checkpoints(make_trainer, run: Path) -> None:
    cut(run / "checkpoint-4" / "optimizer.pt")
    trainer = make_trainer(max_steps=3, save_every=1, resume="auto", keep_checkpoints=1)
    result = trainer.fit()
    assert result.steps == 3
    warned = [record["text"] for record in result.log if record["event"] == "warning"]
    (skipped,) = [text for text in warned if "skipped" in text]
    assert "optimizer.pt" in skipped
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}
    assert (
        make_trainer(max_steps=6, resume="auto").fit().steps == 6
    )  # writes over the damaged one's later steps
    assert make_trainer(max_steps=6, resume="auto").directory.passed_over == {}


def test_auto_never_starts_afresh_over_damaged_checkpoints(make_trainer, run: Path) -> None:
    for name in ("checkpoint-2", "checkpoint-4"):
        cut(run / name / "generators.pt")
    before = contents(run)
    with pytest.raises(ConfigError, match=r"no checkpoint in .* is complete.*checkpoint-4.*checkpoint-2"):
        make_trainer(max_steps=6, resume="auto")
    assert contents(run) == before


def test_a_kill_while_a_checkpoint_is_replaced_loses_nothing(make_trainer, run: Path, monkeypatch) -> None:
    """The old one is moved aside, then the new one put in place: killed in between, the old one comes back."""
    real, moves = Path.rename, []

    class Killed(BaseException):
        pass

    def rename(path: Path, target: Path) -> Path:
        if moves:
            raise Killed
        if path.name == "checkpoint-4":
            moves.append(target)
        return real(path, target)

    before = contents(run / "checkpoint-4")
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(Killed):
        make_trainer(max_steps=4, resume="auto", keep_checkpoints=1).fit()
    monkeypatch.setattr(Path, "rename", real)
    assert not (run / "checkpoint-4").exists()
    trainer = make_trainer(max_steps=4, resume="auto")
    assert trainer.directory.resume_from == run / "checkpoint-4"
    assert contents(run / "checkpoint-4") == before
    assert trainer.fit().steps == 4


@pytest.mark.parametrize("width", [8, 24])
def test_a_checkpoint_of_another_model_is_refused_by_its_file(make_trainer, run: Path, width: int) -> None:
    before = contents(run)
    with pytest.raises(ConfigError, match=r"optimizer\.pt: .* this model"):
        make_trainer(model=TinyLM(width=width), max_steps=6, resume="auto").fit()
    assert contents(run) == before


def test_weights_of_another_model_are_refused_by_their_file(make_trainer, run: Path) -> None:
    torch.manual_seed(0)
    other = torch.load(run / "checkpoint-4" / "optimizer.pt", weights_only=True)
    other["state"] = {}
    torch.save(other, run / "checkpoint-4" / "optimizer.pt")
    edit(run / "checkpoint-4", "files")  # its sums
    with pytest.raises(ConfigError, match=r"model\.safetensors: does not fit this model"):
        make_trainer(model=TinyLM(width=24), max_steps=6, resume="auto").fit()


def test_a_gpt_s_damaged_weights_are_passed_over(make_trainer) -> None:
    def model() -> GPT:
        return GPT(GPTConfig(vocab_size=23, n_positions=16, n_embd=8, n_layer=1, n_head=2))

    folder = make_trainer(model=model(), max_steps=4, save_every=2).fit().checkpoint
    for share in (0.5, 0):
        cut(folder / "model.safetensors", share)
        resumed = make_trainer(model=model(), max_steps=6, resume="auto")
        assert resumed.directory.resume_from == folder.with_name("checkpoint-2")
        assert str(folder / "model.safetensors") in resumed.directory.passed_over["checkpoint-4"]


@pytest.mark.parametrize(
    "line", ["3", "[]", '"x"', "null", "{}", '{"event": "train"}', '{"step": 1, "event": 2}', "{"]
)
def test_a_log_is_read_up_to_what_is_no_record(line: str, tmp_path: Path) -> None:
    good = '{"event": "eval", "step": 1, "loss": 2.0}\n'
    (tmp_path / "log.jsonl").write_text(good + line + "\n" + good)
    assert len(read_log(tmp_path / "log.jsonl")) == 1
    plot_loss(tmp_path / "log.jsonl", tmp_path / "loss.png")
    assert [path.name for path in tmp_path.glob("*.partial")] == []


def test_a_record_without_a_loss_is_not_drawn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no finite loss"):
        plot_loss([{"event": "train", "step": 1}], tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()
