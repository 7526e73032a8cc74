"""Language models on data in files: the bits of a run from memory, files that are read again, and never half of one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from training_cases import rows, save_encoder, write
from typer.testing import CliRunner

from fastattn import cli
from fastattn.data import DataError, TokenStream
from fastattn.data.array_files import ArrayWriter, StoredTexts, load_arrays
from fastattn.models.checkpoint.swap import UNFINISHED
from fastattn.train import corpus
from fastattn.train.task_config import DataConfig

DECODER = ("--model", "nano", "--model.n_embd=16", "--model.n_layer=1", "--model.n_head=2")
DECODER = (*DECODER, "--data.vocab_size=300", "--task.max_length=16", "--model.n_positions=32")
ENCODER = ("--task.max_length=12",)
LEARNT = ("--model", "minilm-l6", "--model.hidden_size=16", "--model.num_hidden_layers=1")
LEARNT = (*LEARNT, "--model.num_attention_heads=2", "--data.vocab_size=80", "--task.max_length=12")
STEPS = ("--train.max_steps=3", "--train.batch_size=4", "--train.device=cpu", "--train.eval_every=2")
MEASURED = {"out", "seconds", "tokens_per_second", "peak_memory", "stopped", "wall_seconds", "mfu"}
LONG = "Anna lives in Paris. The old tower is good! Maria works for Acmes."


def invoke(*words: Any) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, list(map(str, words)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def left(out: Path) -> Any:
    """Everything that a run leaves, without times."""
    report = json.loads((out / "report.json").read_text())
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    files = {name: (out / name).read_bytes() for name in ("model.safetensors", "tokenizer.json", "config.json")
             if (out / name).exists()}  # fmt: skip
    plain = [{k: v for k, v in record.items() if k not in MEASURED} for record in log]
    return {k: v for k, v in report.items() if k not in MEASURED}, plain, files


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    given = [{"text": f"{LONG} {number} mail {number % 7}@acmes.org"} for number in range(30)]
    return write(tmp_path / "train.jsonl", [*given, *given[:4], *rows("masked-lm")])


@pytest.mark.parametrize(
    ("task", "words", "dev"),
    [
        ("causal-lm", (*DECODER, "--clean.exact_duplicates=true", "--clean.emails=true"), False),
        ("causal-lm", (*DECODER, "--task.packing=stream", "--data.tokenizer=characters"), True),
        ("masked-lm", (*ENCODER, "--task.next_sentence=true"), False),
        ("masked-lm", (*LEARNT, "--task.whole_words=true", "--clean.min_chars=20"), True),
    ],
)
def test_a_run_from_files_is_that_from_memory(
    tmp_path: Path, texts: Path, task: str, words: tuple[str, ...], dev: bool
) -> None:
    given: list[Any] = ["train", task, "--train", texts, *words, *STEPS, "--json"]
    given += ["--dev", write(tmp_path / "dev.jsonl", rows("masked-lm"))] if dev else []
    given += [] if "--model" in words else ["--model", save_encoder(tmp_path / "encoder")]
    for name, more in (("memory", ()), ("files", (f"--data.cache={tmp_path / 'cache'}",))):
        code, _, err = invoke(*given, "--out", tmp_path / name, *more)
        assert code == 0, err
    assert left(tmp_path / "files") == left(tmp_path / "memory")
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*") if p.suffix in (".bin", ".json")}
    assert made
    assert not list((tmp_path / "cache").glob(f"{UNFINISHED}*"))
    code, _, err = invoke(*given, "--out", tmp_path / "again", f"--data.cache={tmp_path / 'cache'}")
    assert code == 0, err
    assert left(tmp_path / "again") == left(tmp_path / "memory")
    assert made == {
        p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*") if p.suffix in (".bin", ".json")
    }


@pytest.mark.parametrize("documents", [1, 3])
def test_the_end_of_a_text_is_held_out(tmp_path: Path, documents: int) -> None:
    path = tmp_path / "text.txt"
    lines = [f"{LONG} {number}" for number in range(40)]
    path.write_text("\n\n\n".join("\n".join(lines[number::documents]) for number in range(documents)))
    given = ("train", "causal-lm", "--train", path, *DECODER, *STEPS, "--json")
    for name, more in (("memory", ()), ("files", (f"--data.cache={tmp_path / 'cache'}",))):
        code, _, err = invoke(*given, "--out", tmp_path / name, *more)
        assert code == 0, err
    assert left(tmp_path / "files") == left(tmp_path / "memory")
    report = left(tmp_path / "memory")[0]
    assert (report["train"]["examples"], report["dev"]["examples"]) == (documents, 1)


def test_other_data_options_or_tokens_make_other_files(tmp_path: Path, texts: Path) -> None:
    cache = tmp_path / "cache"
    given = ["train", "causal-lm", "--train", texts, *DECODER, *STEPS, "--json", f"--data.cache={cache}"]

    def folders(name: str, *more: str) -> dict[str, int]:
        code, _, err = invoke(*given, *more, "--out", tmp_path / name)
        assert code == 0, err
        kinds = [path.name.split("-")[0] for path in cache.iterdir() if path.is_dir()]
        return {kind: kinds.count(kind) for kind in sorted(set(kinds))}

    assert folders("first") == {"documents": 1, "tokenizer": 1, "tokens": 1}
    assert folders("rate", "--train.lr=1e-4") == {"documents": 1, "tokenizer": 1, "tokens": 1}
    assert folders("packing", "--task.packing=blocks") == {"documents": 1, "tokenizer": 1, "tokens": 2}
    assert folders("tokens", "--data.vocab_size=310") == {"documents": 1, "tokenizer": 2, "tokens": 3}
    assert folders("clean", "--clean.min_chars=40")["documents"] == 2
    os.utime(texts, ns=(1, 1))
    assert folders("changed")["documents"] == 3


def test_passages_of_another_model_are_of_its_length(tmp_path: Path, texts: Path) -> None:
    """With the same files, tokenizer and options, the limit of passages is still the model's."""
    cache = f"--data.cache={tmp_path / 'cache'}"
    sizes = [word for word in LEARNT if not word.startswith("--task")]
    for positions in (64, 16, 64):
        out = tmp_path / str(positions)
        words = ("--train", texts, *sizes, *STEPS, cache, f"--model.max_position_embeddings={positions}")
        code, _, err = invoke("train", "masked-lm", *words, "--train.overwrite=true", "--out", out)
        assert code == 0, err
    kinds = [path.name.split("-")[0] for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert sorted(kinds) == ["documents", "tokenizer", "tokens", "tokens"]


def test_a_run_that_goes_on_reads_its_files_again(tmp_path: Path, texts: Path) -> None:
    cache = tmp_path / "cache"
    given = ["train", "causal-lm", "--train", texts, *DECODER, *STEPS[1:], "--json", f"--data.cache={cache}"]
    given += ["--train.schedule=constant", "--train.save_every=2", "--resume", "auto"]
    for out, steps in (("whole", (4,)), ("parts", (2, 4))):
        for each in steps:
            code, _, err = invoke(*given, f"--train.max_steps={each}", "--out", tmp_path / out)
            assert code == 0, err
    assert left(tmp_path / "parts")[2] == left(tmp_path / "whole")[2]
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 3


def test_a_damaged_file_is_written_anew(tmp_path: Path, texts: Path) -> None:
    cache = tmp_path / "cache"
    given = ["train", "causal-lm", "--train", texts, *DECODER, *STEPS, "--json", f"--data.cache={cache}"]
    assert invoke(*given, "--out", tmp_path / "first")[0] == 0
    for file in sorted(cache.rglob("*.bin")):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
    code, _, err = invoke(*given, "--out", tmp_path / "second")
    assert code == 0, err
    assert left(tmp_path / "second") == left(tmp_path / "first")


@pytest.mark.parametrize(
    ("task", "line", "says"),
    [
        ("causal-lm", '{"text": 3}', "line 60: text is a int, needs a text"),
        ("masked-lm", '{"text": ', "line 60 is not JSON"),
        ("masked-lm", '{"words": "x"}', "line 60 has no 'text'"),
    ],
)
def test_an_error_in_a_line_leaves_nothing(
    tmp_path: Path, texts: Path, task: str, line: str, says: str
) -> None:
    lines = texts.read_text().splitlines()
    texts.write_text("\n".join([*[*lines, *lines][:59], line]) + "\n")
    model = DECODER if task == "causal-lm" else ("--model", save_encoder(tmp_path / "encoder"))
    cache = tmp_path / "cache"
    for dev in ((), ("--dev", write(tmp_path / "dev.jsonl", rows("masked-lm")))):
        code, _, err = invoke(
            "train", task, "--train", texts, *dev, *model, f"--data.cache={cache}", "--out", tmp_path / "out"
        )
        assert (code, err.count("\n")) == (2, 1), err
        assert says in err
        assert not (tmp_path / "out").exists()
        assert not [path for path in cache.iterdir() if path.is_dir()]


def test_bad_folders_are_named(tmp_path: Path, texts: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    given = ("train", "causal-lm", "--train", texts, *DECODER, "--out", tmp_path / "out")
    for value in (file, file / "below"):
        code, _, err = invoke(*given, f"--data.cache={value}")
        assert (code, err.count("\n")) == (2, 1), err
        assert f"data.cache: {value} cannot be made" in err
    code, _, err = invoke(
        "train", "classify", "--train", write(tmp_path / "c.jsonl", rows("classify")), "--out", tmp_path / "out",
        "--model", save_encoder(tmp_path / "encoder"), f"--data.cache={tmp_path / 'cache'}",
    )  # fmt: skip
    assert (code, "data.cache: is for causal-lm and masked-lm" in err) == (2, True), err
    assert not (tmp_path / "cache").exists()


def test_a_disk_that_is_too_small_is_refused_before_any_work(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(corpus.shutil, "disk_usage", lambda path: usage._replace(free=100))
    code, _, err = invoke(
        "train",
        "causal-lm",
        "--train",
        texts,
        *DECODER,
        "--out",
        tmp_path / "out",
        f"--data.cache={tmp_path}",
    )
    assert code == 2
    assert f"data.cache: {tmp_path} has 0.00 GB free" in err


def test_large_data_goes_into_files(tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "user"))
    given = ("train", "causal-lm", "--train", texts, *DECODER, *STEPS, "--json")
    assert invoke(*given, "--out", tmp_path / "small")[0] == 0
    assert not (tmp_path / "user").exists()
    monkeypatch.setattr(corpus, "LARGE", texts.stat().st_size)
    assert invoke(*given, "--out", tmp_path / "large")[0] == 0
    assert len([path for path in (tmp_path / "user" / "corpora").iterdir() if path.is_dir()]) == 3
    assert left(tmp_path / "large")[2] == left(tmp_path / "small")[2]
    assert DataConfig().cache is None


def test_arrays_are_those_that_were_written(tmp_path: Path) -> None:
    with ArrayWriter(tmp_path, {"a": "uint16", "empty": "int8"}) as arrays:
        arrays.append(a=[1, 2])
        arrays.append(a=[65535], empty=[])
    found = load_arrays(tmp_path, ("a", "empty"))
    assert (found["a"].tolist(), found["empty"].tolist()) == ([1, 2, 65535], [])
    with pytest.raises(DataError, match="b"):
        load_arrays(tmp_path, ("b",))
    (tmp_path / "a.bin").write_bytes(b"123")
    with pytest.raises(DataError, match=r"a\.bin holds 3 bytes, needs 6"):
        load_arrays(tmp_path, ("a",))


def test_texts_are_those_that_were_written(tmp_path: Path) -> None:
    given = ["a", "", "中文 é", "x" * 1000]
    StoredTexts.write(tmp_path, given)
    texts = StoredTexts(tmp_path)
    assert (list(texts), len(texts), texts[-2], texts[1:3]) == (given, 4, given[2], given[1:3])
    with pytest.raises(IndexError):
        texts[4]


def test_an_error_while_writing_keeps_the_folder_incomplete(tmp_path: Path) -> None:
    def broken() -> Any:
        yield "a"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        StoredTexts.write(tmp_path, broken())
    with pytest.raises(DataError):
        StoredTexts(tmp_path)
    with pytest.raises(DataError):
        TokenStream.load(tmp_path)


@pytest.mark.exhaustive
def test_every_write_of_the_files_may_fail_and_their_writer_be_killed(tmp_path: Path) -> None:
    """Folders that have their names are whole; the next run writes what is missing. Every third write is tried."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler on Linux: calls of the C library are replaced")
    library = tmp_path / "full_disk.so"
    source = Path(__file__).with_name("full_disk.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("corpus_worker.py"), tmp_path, library, "3", "8"],
        env={
            **os.environ,
            "LD_PRELOAD": str(library),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        },
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["writes"] > 20
    assert found["kills"] > 0
    assert found["problems"] == []
