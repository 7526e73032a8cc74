"""Options: every key and type checked, from Python, a YAML file or the command line."""

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, fields
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastattn.tasks import causal_lm
from fastattn.train.config import TrainConfig
from fastattn.train.sections import ConfigError, load_config, save_config
from fastattn.train.task_config import read_sections


@dataclass
class Model:
    width: int = 8
    rate: float = 0.5
    sizes: tuple[int, ...] = (1, 2)
    names: list[str] | None = None
    ends: int | Sequence[int] | None = None
    dropout: InitVar[float | None] = None

    def __post_init__(self, dropout):
        self.seen = dropout


SECTIONS = {"train": TrainConfig, "model": Model}
BASE = {"train": {"output_dir": "out", "max_steps": 5}}


def load(*overrides, file=None):
    return load_config(SECTIONS, file=file, overrides=overrides, defaults=BASE)


def test_defaults_then_file_then_overrides(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("train:\n  lr: 3e-4\n  batch_size: 7\n  seed: 3\nmodel: {width: 9, sizes: [4, 5, 6]}\n")
    loaded = load("--train.batch_size=2", "--model.width=10", "--seed=4", file=file)
    train, model = loaded["train"], loaded["model"]
    assert (train.output_dir, train.max_steps, train.lr, train.batch_size, train.seed) == (
        "out",
        5,
        3e-4,
        2,
        4,
    )
    assert (model.width, model.sizes) == (10, (4, 5, 6))


@pytest.mark.parametrize(
    ("word", "section", "key", "value"),
    [
        ("--lr=1e-3", "train", "lr", 1e-3),
        ("--lr=1", "train", "lr", 1.0),
        ("--min-lr-ratio=0", "train", "min_lr_ratio", 0.0),
        ("--compile=true", "train", "compile", True),
        ("--train.compile=False", "train", "compile", False),
        ("--grad_clip=none", "train", "grad_clip", None),
        ("--eval_every=50", "train", "eval_every", 50),
        ("--precision=bfloat16", "train", "precision", "bfloat16"),
        ("--resume=no=way", "train", "resume", "no=way"),
        ("--output_dir=123", "train", "output_dir", "123"),
        ("--sizes=3,4", "model", "sizes", (3, 4)),
        ("--sizes=[3, 4]", "model", "sizes", (3, 4)),
        ("--names=a,b", "model", "names", ["a", "b"]),
        ("--ends=3", "model", "ends", 3),
        ("--ends=3,4", "model", "ends", [3, 4]),
        ("--dropout=0.25", "model", "seen", 0.25),
    ],
)
def test_overrides_are_read_as_their_type(word, section, key, value):
    found = getattr(load(word)[section], key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("--learning_rate=1", r"--learning_rate: no section has this option"),
        ("--warmup_step=1", r"did you mean --train\.warmup_steps\?"),
        ("--train.bach_size=1", r"train: option 'bach_size' is unknown, did you mean batch_size\?"),
        ("--trian.lr=1", r"section 'trian' is unknown, did you mean train\?"),
        ("--batch_size=1.5", r"--train\.batch_size: got '1\.5', needs an integer"),
        ("--batch_size=true", r"needs an integer"),
        ("--lr=fast", r"--train\.lr: got 'fast', needs a number"),
        ("--compile=1", r"--train\.compile: got '1', needs true or false"),
        ("--precision=bf16", r"'bf16', needs one of 'auto'.*did you mean bfloat16"),
        ("--sizes=1,x", r"sizes\[1\]: got 'x', needs an integer"),
        ("lr=1", r"lr=1: needs --section\.key=value"),
        ("--lr", r"needs --section\.key=value"),
    ],
)
def test_bad_overrides_are_refused_with_the_nearest_name(word, complaint):
    with pytest.raises(ConfigError, match=complaint):
        load(word)


def test_an_ambiguous_key_needs_its_section():
    sections = {"a": Model, "b": Model}
    with pytest.raises(ConfigError, match=r"write --a\.width or --b\.width"):
        load_config(sections, overrides=["--width=1"])
    assert load_config(sections, overrides=["--b.width=1"])["b"].width == 1


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("train: {lr: fast}", r"train\.lr: got 'fast', needs a number"),
        ("train: {batch_size: '8'}", r"batch_size: got '8', needs an integer"),
        ("train: {batch_size: true}", r"batch_size: got True, needs an integer"),
        ("train: {compile: 1}", r"compile: got 1, needs true or false"),
        ("train: {warmup: 1}", r"option 'warmup' is unknown, did you mean warmup_steps"),
        ("trains: {lr: 1}", r"section 'trains' is unknown, did you mean train"),
        ("train: 3", r"section train holds 3, needs options"),
        ("- 1", r"holds a list, needs sections"),
        ("a: [", r"is not YAML"),
        ("[" * 9999, r"is not YAML"),
        ("train: {lr: 2020-13-45}", r"is not YAML|train\.lr: got"),
        ("train: {lr: null}", r"train\.lr: got None, needs a number"),
        ("train: null", r"section train holds None, needs options"),
        ("3", r"holds a int, needs sections"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, complaint):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        load(file=file)


def test_missing_file_and_missing_option(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        load(file=tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"train\.output_dir: is not set"):
        load_config(SECTIONS)
    (tmp_path / "empty.yaml").write_text("")
    assert load(file=tmp_path / "empty.yaml") == load()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"batch_size": 0}, "batch_size: got 0, needs an integer of at least 1"),
        ({"batch_size": 2.0}, "batch_size: got 2.0, needs an integer"),
        ({"batch_size": True}, "batch_size: got True"),
        ({"lr": 0.0}, "lr: got 0.0, needs a finite number above 0"),
        ({"lr": float("nan")}, "lr: got nan"),
        ({"grad_clip": -1.0}, "grad_clip"),
        ({"beta2": 1.0}, "beta2: got 1.0"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"precision": "half"}, "precision: got 'half', needs one of"),
        ({"output_dir": ""}, "output_dir"),
        ({"max_steps": None}, "none is set, needs at least one"),
        ({"patience": 2}, "patience: needs eval_every"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite"),
    ],
)
def test_values_out_of_range_are_refused_by_name(options, complaint):
    with pytest.raises(ConfigError, match=complaint):
        TrainConfig(**{"output_dir": "out", "max_steps": 5, **options})


def test_paths_and_whole_numbers_are_taken():
    config = TrainConfig(output_dir=Path("a") / "b", max_steps=5, lr=1)
    assert config.output_dir == str(Path("a") / "b")
    assert type(config.lr) is float


@settings(max_examples=40, deadline=None)
@given(
    st.builds(
        TrainConfig,
        output_dir=st.text(min_size=1),
        max_steps=st.integers(1, 10**9),
        max_seconds=st.none() | st.floats(1e-3, 1e9),
        lr=st.floats(1e-12, 1e3),
        compile=st.booleans(),
        seed=st.integers(0, 2**63),
        resume=st.sampled_from(["never", "auto", "no", "1", "null"]),
    )
)
@example(TrainConfig(output_dir="one\x85two\u2028three", max_steps=1))
@example(TrainConfig(output_dir="输出", max_steps=1))
def test_saved_config_reads_back_equal(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    model = Model(sizes=(7, 8))
    save_config({"train": config, "model": model}, path)
    loaded = load_config(SECTIONS, file=path)
    assert loaded["train"] == config
    assert loaded["model"] == model


def test_every_option_can_be_overridden():
    defaults = TrainConfig(output_dir="out", max_steps=5)
    for field in fields(TrainConfig):
        value = getattr(defaults, field.name)
        if field.name != "output_dir":
            assert load(f"--train.{field.name}={value}")["train"] == defaults


@pytest.mark.parametrize(
    ("words", "epochs"),
    [
        ((), 1.0),
        (("--train.max_seconds=300",), None),
        (("--train.max_steps=7",), None),
        (("--train.max_steps=null",), 1.0),
        (("--train.max_seconds=300", "--train.max_epochs=2"), 2.0),
    ],
)
def test_a_task_s_epochs_hold_where_no_other_limit_is_given(
    words: tuple[str, ...], epochs: float | None
) -> None:
    """A run of 300 seconds ended after one epoch, 75 seconds in."""
    defaults = {**causal_lm.DEFAULTS, "output_dir": "run"}
    sections = read_sections(causal_lm, preset=None, file=None, overrides=words, defaults=defaults)
    assert sections.train.max_epochs == epochs
