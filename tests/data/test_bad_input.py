"""Hostile values for every argument of the data functions, and damaged folders of tokenisers and token streams."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastattn.data
from fastattn.data import (
    BestFitDataset,
    DataError,
    PackedDataset,
    TextFiles,
    Tokenizer,
    TokenStream,
    split,
    train_bpe,
    train_characters,
)
from fastattn.data.packing import IndexSampler

TEXTS = ["The cat sat on the mat.\n" * 20, "A dog.\n" * 20]
HOSTILE: dict[str, Any] = {
    "None": None,
    "True": True,
    "-1": -1,
    "0": 0,
    "1.5": 1.5,
    "nan": math.nan,
    "inf": math.inf,
    "huge": 10**30,
    "text": "x",
    "empty": "",
    "bytes": b"x",
    "zero byte": "a\0b",
    "list": [],
    "numbers": [1, 2],
    "dict": {},
    "object": object(),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, 300)


@pytest.fixture(scope="module")
def stream(tokenizer: Tokenizer) -> TokenStream:
    return TokenStream.build(TEXTS, tokenizer)


def calls(tokenizer: Tokenizer, stream: TokenStream) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Each function with arguments that it takes."""
    return {
        "train_bpe": (
            train_bpe,
            {"documents": TEXTS, "vocab_size": 300, "min_frequency": 2, "special_tokens": ()},
        ),
        "Tokenizer": (
            Tokenizer,
            {
                "core": tokenizer.core,
                "eos_token": tokenizer.eos_token,
                "pad_token": None,
                "settings": None,
                "chat_template": None,
            },
        ),
        "train_characters": (
            train_characters,
            {"documents": TEXTS, "vocab_size": 30, "min_frequency": 2},
        ),
        "encode": (tokenizer.encode, {"text": "x"}),
        "encode_batch": (tokenizer.encode_batch, {"texts": TEXTS}),
        "decode": (tokenizer.decode, {"ids": [1, 2], "skip_special_tokens": True}),
        "TextFiles": (TextFiles, {"paths": [__file__], "max_document": 99}),
        "build": (TokenStream.build, {"documents": TEXTS, "tokenizer": tokenizer, "directory": None}),
        "split": (split, {"stream": stream, "validation_fraction": 0.5, "by": "document"}),
        "PackedDataset": (
            PackedDataset,
            {"stream": stream, "block_size": 8, "pad_id": 0, "segments": False, "drop_last": False},
        ),
        "BestFitDataset": (
            BestFitDataset,
            {
                "tokens": np.arange(9),
                "spans": np.array([[0, 4], [4, 9]]),
                "block_size": 8,
                "bos_id": None,
                "pad_id": 0,
                "counted": None,
                "dropped": 0,
            },
        ),
        "IndexSampler": (IndexSampler, {"length": 5, "seed": 0, "rank": 0, "world_size": 1}),
    }


# Function and argument -> hostile values that mean something there; all others are refused by the argument's name.
TAKES: dict[tuple[str, str], set[str]] = {
    ("train_bpe", "documents"): {"list", "dict"},  # none: an empty vocabulary of bytes
    ("train_bpe", "vocab_size"): set(),
    ("train_bpe", "min_frequency"): set(),
    ("train_bpe", "special_tokens"): {"list", "dict"},
    ("Tokenizer", "core"): set(),
    ("Tokenizer", "eos_token"): {"text"},
    ("Tokenizer", "pad_token"): {"None", "text"},
    ("Tokenizer", "settings"): {"None", "dict"},
    ("Tokenizer", "chat_template"): {"None", "text", "empty", "zero byte"},
    ("train_characters", "documents"): set(),
    ("train_characters", "vocab_size"): set(),
    ("train_characters", "min_frequency"): set(),
    ("encode", "text"): {"text", "empty", "zero byte"},
    ("encode_batch", "texts"): {"list", "dict"},
    ("decode", "ids"): {"list", "numbers", "dict"},
    ("decode", "skip_special_tokens"): {"True"},
    ("TextFiles", "max_document"): set(),
    ("build", "documents"): set(),
    ("build", "tokenizer"): set(),
    ("split", "stream"): set(),
    ("split", "validation_fraction"): set(),
    ("split", "by"): set(),
    ("PackedDataset", "stream"): set(),
    ("PackedDataset", "block_size"): set(),
    ("PackedDataset", "pad_id"): {"0"},
    ("PackedDataset", "segments"): {"True"},
    ("PackedDataset", "drop_last"): {"True"},
    ("BestFitDataset", "tokens"): set(),
    ("BestFitDataset", "spans"): set(),
    ("BestFitDataset", "block_size"): set(),
    ("BestFitDataset", "bos_id"): {"None", "0"},
    ("BestFitDataset", "pad_id"): {"0"},
    ("BestFitDataset", "counted"): {"None"},
    ("BestFitDataset", "dropped"): {"0"},
    ("IndexSampler", "length"): set(),
    ("IndexSampler", "seed"): {"0"},
    ("IndexSampler", "rank"): {"0"},
    ("IndexSampler", "world_size"): set(),
}
PATHS = {("TextFiles", "paths"), ("build", "directory")}  # tested below: any text may be a path


def test_every_argument_is_in_the_table(tokenizer: Tokenizer, stream: TokenStream) -> None:
    given = calls(tokenizer, stream)
    for name, (function, arguments) in given.items():
        assert list(inspect.signature(function).parameters) == list(arguments), name
    assert {
        (name, argument) for name, (_, each) in given.items() for argument in each
    } == TAKES.keys() | PATHS


@pytest.mark.parametrize(("name", "argument"), TAKES, ids=[" ".join(key) for key in TAKES])
def test_what_means_nothing_is_refused_by_name(
    name: str, argument: str, tokenizer: Tokenizer, stream: TokenStream
) -> None:
    function, arguments = calls(tokenizer, stream)[name]
    for kind, value in HOSTILE.items():
        if kind in TAKES[name, argument]:
            function(**{**arguments, argument: value})
            continue
        with pytest.raises((TypeError, ValueError), match=rf"^{argument}: "):
            function(**{**arguments, argument: value})


@pytest.mark.parametrize(
    "value",
    [None, 3, 1.5, {}, object(), [3], [None], [], "", "a\0b", "x" * 5000],
    ids=lambda v: repr(v)[:12].partition(" at ")[0],
)
def test_paths_of_another_type_or_to_nowhere_are_refused(value: Any) -> None:
    with pytest.raises((TypeError, DataError)) as caught:
        TextFiles(value)
    assert isinstance(caught.value, DataError) or str(caught.value).startswith("paths: ")


def write(name: str, text: str | bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def cut(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-5])


def starts(*values: int, dtype: Any = np.int64) -> Callable[[Path], Any]:
    return lambda folder: np.save(folder / "starts.npy", np.array(values, dtype))


STREAM_DAMAGES: dict[str, Callable[[Path], Any]] = {
    "no json": lambda folder: (folder / "stream.json").unlink(),
    "no starts": lambda folder: (folder / "starts.npy").unlink(),
    "no tokens": lambda folder: (folder / "tokens.bin").unlink(),
    "empty tokens": write("tokens.bin", b""),
    "cut tokens": cut("tokens.bin"),
    "cut starts": cut("starts.npy"),
    "empty starts": write("starts.npy", b""),
    "cut json": cut("stream.json"),
    "list": write("stream.json", "[]"),
    "null": write("stream.json", "null"),
    "nested": write("stream.json", "[" * 99999),
    "no dtype": write("stream.json", '{"tokens": 3}'),
    "null dtype": write("stream.json", '{"dtype": null, "tokens": 3}'),
    "object dtype": write("stream.json", '{"dtype": "O", "tokens": 3}'),
    "no count": write("stream.json", '{"dtype": "uint16"}'),
    "text count": write("stream.json", '{"dtype": "uint16", "tokens": "3"}'),
    "no documents": starts(),
    "falling": starts(0, 5, 3),
    "late": starts(1, 5),
    "beyond": starts(0, 10**6),
    "floats": starts(0, 5, dtype=np.float64),
    "pickled": lambda folder: np.save(folder / "starts.npy", np.array([{}], object), allow_pickle=True),
}


@pytest.mark.parametrize("kind", STREAM_DAMAGES)
def test_a_damaged_stream_is_refused_with_its_folder(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    TokenStream.build(TEXTS, tokenizer, tmp_path)
    STREAM_DAMAGES[kind](tmp_path)
    with pytest.raises(DataError, match="^" + str(tmp_path)):
        TokenStream.load(tmp_path)


TOKENIZER_DAMAGES: dict[str, Callable[[Path], Any]] = {
    "none": lambda folder: (folder / "tokenizer.json").unlink(),
    "cut": cut("tokenizer.json"),
    "empty": write("tokenizer.json", ""),
    "null": write("tokenizer.json", "null"),
    "binary": write("tokenizer.json", b"\xff\xfe"),
    "cut settings": cut("tokenizer_config.json"),
    "list of settings": write("tokenizer_config.json", "[]"),
    "nested settings": write("tokenizer_config.json", "[" * 99999),
    "binary settings": write("tokenizer_config.json", b"\xff\xfe"),
    "unknown end": write("tokenizer_config.json", '{"eos_token": "<gone>"}'),
    "unknown padding": write("tokenizer_config.json", json.dumps({"eos_token": "a", "pad_token": "<gone>"})),
}


@pytest.mark.parametrize("kind", TOKENIZER_DAMAGES)
def test_a_damaged_tokeniser_is_refused_with_its_folder(
    kind: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.partial"))
    TOKENIZER_DAMAGES[kind](tmp_path)
    with pytest.raises(DataError, match="^" + str(tmp_path)):
        Tokenizer.from_pretrained(tmp_path)


def test_every_public_function_is_here_or_takes_nothing() -> None:
    tested = {"PackedDataset", "TextFiles", "TokenStream", "Tokenizer", "split", "train_bpe", "IndexSampler"}
    tested |= {"BestFitDataset", "train_characters"}
    public = {name for name in fastattn.data.__all__ if callable(getattr(fastattn.data, name))}
    assert public - tested - {"DataError", "default_corpus"} == set()
