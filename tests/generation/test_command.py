"""`fastattn generate`: the continuation of the folder's model, streamed or as JSON; bad input in one line."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_cases import make, tokenizer
from typer.testing import CliRunner

from fastattn import cli
from fastattn.data import Tokenizer, json_lines, train_bpe, train_characters
from fastattn.generation.text import UNKNOWN, Detokenizer
from fastattn.models import (
    GPT,
    BertConfig,
    BertForMaskedLM,
    EncoderDecoder,
    EncoderDecoderConfig,
    bert_decoder,
)
from fastattn.models.lora import adapters_of, attach, merge
from fastattn.models.peft import save_adapter
from fastattn.models.steps import GPTDecoder

PROMPT = "stop the end"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    make(vocab_size=tokenizer().vocab_size).save_pretrained(made)
    tokenizer().save_pretrained(made)
    return made


def invoke(*words: Any, given: str | None = None) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, ["generate", *map(str, words)], input=given)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    # not result.stdout, which turns \r\n into \n
    return result.exit_code, result.stdout_bytes.decode(), result.stderr


def expected(folder: Path, prompt: str, kind: str | None = None, **options: Any) -> str:
    """The text of the model's continuation, but for bytes at its end that are no character."""
    model = GPT.from_pretrained(folder).quantize(kind)
    ids = torch.tensor([tokenizer().encode(prompt)])
    made = model.generate(ids, **{"max_new_tokens": 12, **options})[0, ids.shape[1] :].tolist()
    detokenizer = Detokenizer(tokenizer(), ids[0].tolist())
    text = "".join(map(detokenizer.push, made))
    # how many marks stand for bytes that are no character depends on how they are cut
    shown, whole = (re.sub(UNKNOWN + "+", UNKNOWN, t) for t in (text, tokenizer().decode(made)))
    assert shown.rstrip(UNKNOWN) == whole.rstrip(UNKNOWN)
    return text


WAYS: list[tuple[list[str], dict[str, Any]]] = [
    ([], {}),
    (["--temperature=0"], {}),
    (["--temperature=0", "--top-p=1", "--top-k=0", "--min-p=0"], {}),
    (
        ["--temperature=2.5", "--top-k=30", "--top-p=0.9", "--min-p=0.01", "--seed=3"],
        {"do_sample": True, "temperature": 2.5, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "seed": 3},
    ),
    (
        ["--repetition-penalty=1.4", "--presence-penalty=0.5"],
        {"repetition_penalty": 1.4, "presence_penalty": 0.5},
    ),
    (["--num-beams=3"], {"num_beams": 3}),
    (["--prompt-lookup=5"], {}),
]


@pytest.mark.parametrize(("words", "options"), WAYS, ids=[" ".join(words) for words, _ in WAYS])
def test_the_text_is_that_of_generate(folder: Path, words: list[str], options: dict[str, Any]) -> None:
    text = expected(folder, PROMPT, **options)
    assert invoke(folder, f"--prompt={PROMPT}", "--max-new-tokens=12", *words) == (0, text + "\n", "")


def test_standard_input_lines_of_a_file_and_json(folder: Path, tmp_path: Path) -> None:
    text = expected(folder, PROMPT)
    assert invoke(folder, "--max-new-tokens=12", given=PROMPT + "\n") == (0, text + "\n", "")
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "stop"}\n\n{"prompt": "你好", "more": 1}\n', encoding="utf-8")
    code, out, _ = invoke(folder, f"--data={data}", "--max-new-tokens=12", "--json")
    assert code == 0
    assert json.loads(out)["continuations"] == [
        {"prompt": prompt, "text": expected(folder, prompt)} for prompt in ("stop", "你好")
    ]
    code, out, _ = invoke(folder, f"--data={data}", "--max-new-tokens=12")
    assert out == "\n".join(expected(folder, prompt) for prompt in ("stop", "你好")) + "\n"
    stop = text[3:5]
    code, out, _ = invoke(folder, f"--prompt={PROMPT}", "--max-new-tokens=12", f"--stop={stop}", "--stop=zzz")
    assert out == text[: text.index(stop)] + "\n"


def test_line_separators_within_a_json_string_end_no_line(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    prompt = "a\N{LINE SEPARATOR}b\x85c"
    data.write_text(json.dumps({"prompt": prompt}, ensure_ascii=False), encoding="utf-8")
    code, out, _ = invoke(folder, f"--data={data}", "--max-new-tokens=12", "--json")
    assert (code, json.loads(out)["continuations"][0]["prompt"]) == (0, prompt)


def test_a_file_that_is_too_long_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "x"}')
    monkeypatch.setattr(json_lines, "MAX_BYTES", 14)
    code, out, err = invoke(folder, f"--data={data}")
    assert (code, out, err) == (2, "", f"fastattn: --data {data}: holds over 14 bytes\n")


def test_what_is_not_given_is_taken_from_the_folder(folder: Path, tmp_path: Path) -> None:
    prompt = "the end"
    model = GPT.from_pretrained(folder)
    model.generation_config = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 3}
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    beams = expected(folder, prompt, num_beams=3)
    assert beams != expected(folder, prompt)
    assert invoke(tmp_path, f"--prompt={prompt}", "--max-new-tokens=12") == (0, beams + "\n", "")
    plain = invoke(tmp_path, f"--prompt={prompt}", "--max-new-tokens=12", "--num-beams=1")
    assert plain == (0, expected(folder, prompt) + "\n", "")


@pytest.fixture(scope="module")
def seq2seq_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder-decoder's folder, with weights by which the likeliest tokens stand out."""
    made = tmp_path_factory.mktemp("seq2seq")
    seq2seq(tokenizer().vocab_size).save_pretrained(made)
    tokenizer().save_pretrained(made)
    return made


def seq2seq(vocab_size: int, decoder_vocab_size: int | None = None) -> EncoderDecoder:
    torch.manual_seed(2)
    encoder = BertConfig(
        vocab_size=vocab_size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    decoder = bert_decoder(dataclasses.replace(encoder, vocab_size=decoder_vocab_size or vocab_size))
    return EncoderDecoder(EncoderDecoderConfig(encoder, decoder, decoder_start_token_id=1, eos_token_id=2))


@pytest.mark.parametrize(("words", "options"), WAYS, ids=[" ".join(words) for words, _ in WAYS])
def test_an_encoder_decoder_writes_the_target_of_a_source(
    seq2seq_folder: Path, words: list[str], options: dict[str, Any]
) -> None:
    model = EncoderDecoder.from_pretrained(seq2seq_folder)
    source = torch.tensor([tokenizer().encode(PROMPT)])
    made = model.generate(source, **{"max_new_tokens": 12, **options})[0, 1:].tolist()
    text = tokenizer().decode(made)
    assert len(set(made)) > 1
    code, out, err = invoke(seq2seq_folder, f"--prompt={PROMPT}", "--max-new-tokens=12", *words)
    assert (code, err) == (0, "")
    # how many marks stand for bytes that are no character depends on how they are cut
    out, text = (re.sub(UNKNOWN + "+", UNKNOWN, t).rstrip(UNKNOWN + "\n") for t in (out, text))
    assert out == text


def test_a_folder_whose_model_or_tokenizer_does_not_fit_is_refused(tmp_path: Path) -> None:
    vocab = tokenizer().vocab_size
    small, ids = seq2seq(vocab - 7), f"tokenizer: has ids up to {vocab - 1}"
    for name, model, complaint in (
        (
            "encoder",
            BertForMaskedLM(small.config.encoder),
            "holds a BertForMaskedLM, which does not generate text",
        ),
        (
            "two",
            seq2seq(vocab, vocab + 3),
            "its tokenizer cannot be used for both parts, the encoder has 274",
        ),
        ("small", small, f"{ids}, the encoder's vocab_size is {vocab - 7}"),
        ("gpt", make(), f"{ids}, the model's vocab_size is 61"),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
        code, out, err = invoke(tmp_path / name, "--prompt=x")
        assert (code, out) == (2, "")
        assert err.startswith(f"fastattn: {tmp_path / name}: {complaint}")
        assert err.count("\n") == 1


def test_added_tokens_beyond_the_vocabulary_are_refused_in_prompts_only(tmp_path: Path) -> None:
    """As those for images of language models whose tokenizer is that of larger ones."""
    of = train_bpe(["stop the end, stop here and there"] * 3, vocab_size=280)
    vocab = of.vocab_size
    make(vocab_size=vocab).save_pretrained(tmp_path)
    of.core.add_special_tokens(["<image>", "<audio>"])
    assert of.core.token_to_id("<image>") == vocab
    of.save_pretrained(tmp_path)
    beyond = "tokenizer: has the added token '<image>' and 1 more beyond"
    with pytest.warns(UserWarning, match=beyond):
        code, _, err = invoke(tmp_path, "--prompt=stop the", "--max-new-tokens=4")
    assert (code, err) == (0, "")
    with pytest.warns(UserWarning, match=beyond):
        code, out, err = invoke(tmp_path, "--prompt=stop <image>", "--max-new-tokens=4")
    assert (code, out) == (2, "")
    assert err == "fastattn: --prompt: holds '<image>', a token that the model has no embedding for\n"


def test_targets_may_have_a_tokenizer_of_their_own(tmp_path: Path) -> None:
    vocab = tokenizer().vocab_size
    other = train_characters(["stop the end, 你好"])
    model = seq2seq(vocab, other.vocab_size)
    both, target = tmp_path / "both", tmp_path / "target"
    model.save_pretrained(both)
    tokenizer().save_pretrained(both)
    other.save_pretrained(target)
    made = model.eval().generate(torch.tensor([tokenizer().encode(PROMPT)]), max_new_tokens=12)[0, 1:]
    words = [f"--prompt={PROMPT}", "--max-new-tokens=12"]
    for more in ([], ["--num-beams=1"], ["--prompt-lookup=4"]):
        code, out, err = invoke(both, *words, f"--target-tokenizer={target}", *more)
        assert (code, out, err) == (0, other.decode(made.tolist()) + "\n", "")
    code, _, err = invoke(both, *words)
    assert code == 2
    assert err.endswith("--target-tokenizer names the decoder's\n")
    tokenizer().save_pretrained(target)
    code, _, err = invoke(both, *words, f"--target-tokenizer={target}")
    assert code == 2
    assert err.startswith(f"fastattn: {target}: tokenizer: has ids up to")


def test_one_model_writes_what_it_reads(folder: Path) -> None:
    code, out, err = invoke(folder, "--prompt=x", f"--target-tokenizer={folder}")
    assert (code, out) == (2, "")
    assert (
        err == f"fastattn: --target-tokenizer: {folder} holds no encoder-decoder, it writes what it reads\n"
    )


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_an_adapter_generates_with_the_model_that_it_names(
    folder: Path, with_tokenizer: bool, tmp_path: Path
) -> None:
    model = attach(GPT.from_pretrained(folder), r=4)
    torch.manual_seed(0)
    for adapter in adapters_of(model):
        torch.nn.init.normal_(adapter.lora_B)
    save_adapter(model, tmp_path)
    if with_tokenizer:
        tokenizer().save_pretrained(tmp_path)
    words = [f"--prompt={PROMPT}", "--max-new-tokens=12"]
    code, out, err = invoke(tmp_path, *words)
    merge(model).save_pretrained(tmp_path / "merged", tokenizer=tokenizer())
    assert (code, err) == (0, "")
    assert out == invoke(tmp_path / "merged", *words)[1]
    assert out != invoke(folder, *words)[1]


@pytest.mark.parametrize("kind", ["unnamed end", "word pieces"])
def test_a_tokenizer_that_names_no_end_has_the_model_s(kind: str, tmp_path: Path) -> None:
    """A folder with tokenizer.json alone, and one with BERT's vocab.txt: the end is that of config.json."""
    if kind == "word pieces":
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "stop", "the", "end", "##s", "."]
        core = None
    else:
        core = train_characters(["stop the end."]).core
        pieces = sorted(core.get_vocab(), key=core.token_to_id)
    model = make(vocab_size=len(pieces), eos_token_id=3)
    model.save_pretrained(tmp_path)
    if core is None:
        (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    else:
        core.save(str(tmp_path / "tokenizer.json"))
    tokens = Tokenizer.from_pretrained(tmp_path)
    assert (tokens.eos_id, tokens.eos_token) == (3, pieces[3])
    ids = tokens.core.encode(PROMPT).ids
    made = model.generate(torch.tensor([ids]), max_new_tokens=6)[0, len(ids) :].tolist()
    code, out, err = invoke(tmp_path, f"--prompt={PROMPT}", "--max-new-tokens=6")
    assert (code, err) == (0, "")
    assert made
    assert tokens.decode(made).split() == out.split()


def test_a_sentencepiece_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    code, out, err = invoke(tmp_path, "--prompt=x")
    assert (code, out) == (2, "")
    assert err.startswith(f"fastattn: {tmp_path}: holds tokenizer.model, needs tokenizer.json")


def test_a_source_longer_than_the_encoder_reads_is_refused(seq2seq_folder: Path) -> None:
    code, out, err = invoke(seq2seq_folder, "--prompt=" + "stop " * 200)
    assert (code, out) == (2, "")
    assert err.startswith("fastattn: input_ids: ")


def test_logits_that_are_not_finite_are_reported_and_a_mistake_is_not_hidden(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad input ends with a line and code 2; an error inside the package keeps its traceback."""

    def broken(self: Any, *arguments: Any, **options: Any) -> Any:
        raise ValueError("a mistake")

    size = tokenizer().vocab_size
    for words in ([], ["--num-beams=2"]):
        with monkeypatch.context() as patch:
            patch.setattr(GPTDecoder, "prefill", broken)
            result = CliRunner().invoke(
                cli.app, ["generate", str(folder), "--prompt=x", "--max-new-tokens=5", *words]
            )
            assert isinstance(result.exception, ValueError)
            assert str(result.exception) == "a mistake"
        with monkeypatch.context() as patch:
            patch.setattr(GPTDecoder, "step", lambda self, tokens: torch.full((len(tokens), size), torch.nan))
            code, _, err = invoke(folder, "--prompt=x", "--max-new-tokens=5", *words)
            assert code == 2
            assert err.startswith("fastattn: model: its logits for token 1 after the prompt are not finite")


def test_8_bit_weights(folder: Path) -> None:
    _, out, _ = invoke(folder, f"--prompt={PROMPT}", "--max-new-tokens=12", "--int8", "--json")
    assert json.loads(out)["continuations"][0]["text"] == expected(folder, PROMPT, "int8")


def damaged(kind: str, folder: Path, tmp_path: Path) -> Path:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    {
        "no config": lambda: (broken / "config.json").unlink(),
        "no tokenizer": lambda: (broken / "tokenizer.json").unlink(),
        "no weights": lambda: (broken / "model.safetensors").unlink(),
        "other model": lambda: (broken / "config.json").write_text('{"model_type": "mixtral"}'),
        "no json": lambda: (broken / "config.json").write_text("{"),
    }[kind]()
    return broken


@pytest.mark.parametrize("kind", ["no config", "no tokenizer", "no weights", "other model", "no json"])
def test_a_folder_that_cannot_be_used_is_named_in_one_line(kind: str, folder: Path, tmp_path: Path) -> None:
    code, out, err = invoke(damaged(kind, folder, tmp_path), "--prompt=x")
    assert code in (1, 2)
    assert out == ""
    assert err.startswith("fastattn: ")
    assert err.count("\n") == 1
    assert "broken" in err


def test_a_name_that_no_folder_can_have_is_named() -> None:
    code, out, err = invoke("x" * 5000, "--prompt=x")
    assert (code, out) == (2, "")
    assert err.startswith("fastattn: xxx")
    assert err.endswith(": no such folder, needs one with config.json and weights\n")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--prompt=x", "--data=tests"], "--data tests: no such file"),
        (
            ["--prompt=x", "--temperature=0", "--top-k=3"],
            "--temperature 0: is greedy decoding, which does not use --top-k",
        ),
        (["--prompt=x", "--num-beams=2", "--stop=x"], "stop_strings, num_beams: do not go together"),
        (["--prompt=x", "--max-new-tokens=1000"], "max_new_tokens: a prompt of 1 and 1000 more tokens"),
        ([], "--prompt: got no text, and none on standard input"),
    ],
)
def test_options_that_cannot_be_used_are_named_in_one_line(
    folder: Path, words: list[str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = invoke(folder, *words, given="")
    assert (code, out) == (2, "")
    assert err.startswith(f"fastattn: {complaint}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "3", '{"prompt": 3}', '{"prompt": ""}', '{"prompt": "\\ud800"}', '{"text": "x"}', ""],
)
def test_a_line_of_data_without_a_prompt_is_named(folder: Path, line: str, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(line)
    code, out, err = invoke(folder, f"--data={data}")
    assert (code, out) == (2, "")
    assert err.startswith(f"fastattn: --data {data}: ")
