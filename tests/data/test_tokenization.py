"""Tokenisers: lossless on any text, the same on every run, and readable by transformers."""

import json
import os
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn.data.corpora import DataError, default_corpus
from fastattn.data.tokenization import END_OF_TEXT, PADDING, Tokenizer, train_bpe, train_characters


@pytest.fixture(scope="module")
def documents():
    return default_corpus()[:12]


@pytest.fixture(scope="module")
def tokenizer(documents):
    return train_bpe(documents, 600)


def test_vocabulary_has_the_size_asked_for_and_specials_first(tokenizer):
    assert tokenizer.vocab_size == 600
    assert (tokenizer.eos_id, tokenizer.pad_id) == (0, 1)
    assert tokenizer.decode([0, 1], skip_special_tokens=False) == END_OF_TEXT + PADDING


def test_merges_shorten_text(tokenizer, documents):
    assert len(tokenizer.encode(documents[0])) < 0.6 * len(documents[0].encode())


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60).filter(lambda text: "<|" not in text))
def test_every_text_survives(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_batch_agrees_with_single(tokenizer, documents):
    assert tokenizer.encode_batch(documents[:3]) == [tokenizer.encode(d) for d in documents[:3]]


def test_truncation_and_padding_of_a_file_are_not_applied(tokenizer, documents, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    stored = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    stored.enable_truncation(4)
    stored.enable_padding(length=6)
    stored.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.from_pretrained(tmp_path)
    expected = tokenizer.encode(documents[0])
    assert loaded.encode(documents[0]) == loaded.encode_batch(["a", documents[0]])[1] == expected
    assert loaded.core.encode(documents[0]).ids == expected


def test_training_is_the_same_in_every_process():
    program = (
        "import hashlib; from fastattn.data import default_corpus, train_bpe; "
        "print(hashlib.sha256(train_bpe(default_corpus()[:12], 600).core.to_str().encode()).hexdigest())"
    )
    digests = set()
    for threads, seed in (("1", "1"), ("4", "2")):
        env = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, check=True)
        digests.add(done.stdout)
    assert len(digests) == 1


def test_saved_folder_loads_again(tokenizer, documents, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert loaded.encode(documents[0]) == tokenizer.encode(documents[0])
    assert (loaded.eos_id, loaded.pad_id, loaded.vocab_size) == (0, 1, 600)


def test_transformers_reads_the_folder(tokenizer, documents, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save_pretrained(tmp_path, max_length=128)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = documents[0][:2000] + " naïve 漢字 🙂\t  end "
    assert theirs(text).input_ids == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.model_max_length) == (0, 1, 128)


def test_gpt2_style_files_load(tokenizer, documents, tmp_path):
    model = json.loads(tokenizer.core.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert loaded.encode(documents[1]) == tokenizer.encode(documents[1])
    assert loaded.encode(END_OF_TEXT) == [loaded.eos_id] == [0]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"vocab_size": 257}, "vocab_size: got 257, needs at least 258"),
        ({"min_frequency": 0}, "min_frequency"),
    ],
)
def test_bad_options_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        train_bpe(["text"], **options)


def test_folders_that_hold_no_tokeniser_are_refused(tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"holds none of tokenizer\.json, vocab\.json"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(DataError, match=r"tokenizer_config\.json"):
        Tokenizer.from_pretrained(tmp_path)


def test_special_tokens_must_be_in_the_vocabulary(tokenizer):
    with pytest.raises(ValueError, match="eos_token: '<missing>' is not in the vocabulary"):
        Tokenizer(tokenizer.core, eos_token="<missing>")


def test_characters_are_tokens_and_unknown_ones_are_told(tmp_path):
    documents = ["to be, or\n\tnot to be", "今天 天气"]
    tokenizer = train_characters(documents, 100)
    for text in (*documents, "be not\n to be"):
        ids = tokenizer.encode(text)
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("bz") == [tokenizer.encode("b")[0], 2]
    assert train_characters(documents, 6).vocab_size == 6
    frequent = train_characters(documents, 6)
    assert [frequent.core.id_to_token(i) for i in range(3, 6)] == [
        " ",
        "o",
        "t",
    ]  # of equally many in their order
    assert train_characters(documents, 100, min_frequency=2).vocab_size < tokenizer.vocab_size
    tokenizer.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.encode(documents[0] + "z") == tokenizer.encode(documents[0] + "z")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (*documents, "bz\n"):
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(documents[0])) == documents[0]
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id) == (0, 1, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], 3), "vocab_size"),
        ((["a"], 10.0), "vocab_size"),
        (("text",), "documents"),
        (([1],), "documents"),
        (([""],), "documents"),
    ],
)
def test_bad_arguments_of_characters_are_named(arguments, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        train_characters(*arguments)


def test_what_a_folder_says_of_its_tokenizer_is_saved_again(tokenizer, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    tokenizer.save_pretrained(first)
    settings = json.loads((first / "tokenizer_config.json").read_text())
    settings.update(bos_token="<|padding|>", padding_side="left", chat_template="{{ messages }}")
    (first / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = Tokenizer.from_pretrained(first)
    assert (loaded.chat_template, loaded.special_texts()["bos_token"]) == ("{{ messages }}", "<|padding|>")
    loaded.save_pretrained(second)
    saved = json.loads((second / "tokenizer_config.json").read_text())
    assert (saved["bos_token"], saved["padding_side"]) == ("<|padding|>", "left")
    assert "chat_template" not in saved
    assert (second / "chat_template.jinja").read_text() == "{{ messages }}"
    assert Tokenizer.from_pretrained(second).chat_template == "{{ messages }}"
    settings["chat_template"] = [{"name": "tools", "template": "x"}, {"name": "default", "template": "y"}]
    (first / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Tokenizer.from_pretrained(first).chat_template == "y"
    (first / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"chat_template.jinja: cannot be read"):
        Tokenizer.from_pretrained(first)
