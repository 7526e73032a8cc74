"""Stop strings and streams: nothing of a stop string, no half character, whatever the tokens are."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from generation_cases import TEXT, Letters, Script, make, prompts, tokenizer

from fastattn.data import Tokenizer, train_bpe
from fastattn.generation import generate, stream_ids, stream_text
from fastattn.generation.stopping import StopStrings
from fastattn.generation.text import CONTEXT, UNKNOWN, Detokenizer, RowText

IDS = tokenizer().encode(TEXT)
PROMPT = torch.tensor([tokenizer().encode("stop the end")])
STOPS = [
    ["here"],
    ["你好"],
    ["好"],
    [", 世"],
    ["😀"],
    ["👍 and"],
    ["👧 t"],
    ["\u200d👩"],
    ["e"],
    ["The end.\n"],
    ["no such", "text"],
    ["code 😀👍 and 👩\u200d👩\u200d👧 too", "é", "Ün"],
]


def script(**options: Any) -> Script:
    return Script(IDS, tokenizer().vocab_size, **options)


def cut(text: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first, by the definition."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


@pytest.mark.parametrize("stops", STOPS, ids=str)
def test_nothing_of_a_stop_string_is_streamed_or_returned(stops: list[str]) -> None:
    assert len(IDS) > len(TEXT)  # most characters span tokens
    options: dict[str, Any] = {"tokenizer": tokenizer(), "stop_strings": stops, "max_new_tokens": len(IDS)}
    expected = cut(TEXT, stops)
    pieces = list(stream_text(script(), PROMPT, **options))
    assert "".join(pieces) == expected
    assert all(pieces)
    assert not any(UNKNOWN in piece for piece in pieces)
    model = script()
    made = generate(model, PROMPT, **options)[0, PROMPT.shape[1] :].tolist()
    assert made == IDS[: len(made)]
    text = tokenizer().decode(made)
    assert expected.startswith(text)
    assert len(tokenizer().decode(IDS[: len(made) + 1])) > len(expected) or text == expected
    given = list(stream_ids(script(), PROMPT, **options))
    assert [token for part in given for token in part] == made
    for end in range(1, len(given)):
        so_far = tokenizer().decode([token for part in given[:end] for token in part])
        assert expected.startswith(so_far.rstrip(UNKNOWN))


def test_a_stop_string_ends_the_work_where_it_is_complete() -> None:
    model, steps = script(), []
    step = model.step
    model.step = lambda *args: steps.append(1) or step(*args)  # type: ignore[method-assign,func-returns-value]
    generate(model, PROMPT, tokenizer=tokenizer(), stop_strings="here", max_new_tokens=len(IDS))
    assert tokenizer().decode(IDS[: len(steps)]).rstrip(UNKNOWN).endswith("here")


def test_the_first_string_to_be_complete_ends_a_row_and_of_those_the_longest() -> None:
    for pieces in (["abcd"], ["a", "b", "c", "d"], ["ab", "cd"], ["abc", "d"]):
        for strings, expected in (
            (["bc", "abcd"], "a"),
            (["bc", "abc"], ""),
            (["d", "cd"], "ab"),
            (["x", "abd"], "abcd"),
            (["da", "dd"], "abcd"),
        ):
            stops = StopStrings(strings)
            found = "".join(map(stops.push, pieces))
            assert stops.found == (expected != "abcd")
            assert found + stops.finish() == expected, (pieces, strings)


def test_any_cut_of_any_text_is_that_of_the_definition() -> None:
    dice = random.Random(0)
    for _ in range(400):
        text = "".join(dice.choices("ab", k=12))
        strings = ["".join(dice.choices("ab", k=dice.randint(2, 5))) for _ in range(dice.randint(1, 3))]
        stops, found, place = StopStrings(strings), "", 0
        while place < len(text):
            size = dice.randint(1, 4)
            found += stops.push(text[place : place + size])
            assert cut(text, strings).startswith(found)
            place += size
        assert found + stops.finish() == cut(text, strings)


def test_rows_of_a_batch_stop_by_themselves() -> None:
    model = make(torch.float64)
    ids, mask = prompts((8, 3, 5))
    free = model.generate(ids, mask, max_new_tokens=20)[:, 8:].tolist()
    stop = Letters().decode(free[1][4:6])
    expected = [cut(Letters().decode(row), [stop]) for row in free]
    assert len(expected[1]) <= 4
    options: dict[str, Any] = {"max_new_tokens": 20, "stop_strings": stop, "tokenizer": Letters()}
    out = model.generate(ids, mask, pad_token_id=60, **options)[:, 8:].tolist()
    longest = max(map(len, expected))
    for row, text in zip(out, expected):
        assert Letters().decode(row[: len(text)]) == text
        assert row[len(text) :] == [60] * (longest - len(text))
    with pytest.raises(ValueError, match=r"^pad_token_id: got None.*end at a string"):
        model.generate(ids, mask, **options)


def test_the_end_token_ends_text_and_is_no_part_of_it() -> None:
    eos = tokenizer().eos_id
    options: dict[str, Any] = {"tokenizer": tokenizer(), "max_new_tokens": 500}
    assert "".join(stream_text(script(eos=eos), PROMPT, **options)) == TEXT
    made = generate(script(eos=eos), PROMPT, stop_strings="no such", **options)[0, PROMPT.shape[1] :]
    assert made.tolist() == [*IDS, eos]
    assert "".join(stream_text(script(eos=eos), PROMPT, stop_strings="\n...", **options)) == TEXT


@pytest.mark.parametrize("kind", ["fastattn", "tokenizers", "transformers"])
def test_a_stop_string_may_be_a_special_token(kind: str) -> None:
    own = train_bpe(["stop the end"] * 3, vocab_size=280, special_tokens=["<|im_end|>", "<|im_start|>"])
    of: Any = own if kind == "fastattn" else own.core
    if kind == "transformers":
        of = pytest.importorskip("transformers").PreTrainedTokenizerFast(tokenizer_object=own.core)
    end = own.core.token_to_id("<|im_end|>")
    ids = [*own.encode("the end"), end, *own.encode(" stop")]
    options: dict[str, Any] = {"tokenizer": of, "stop_strings": "<|im_end|>", "max_new_tokens": 40}
    made = generate(Script(ids, own.vocab_size), PROMPT, **options)[0, PROMPT.shape[1] :]
    assert made.tolist() == ids[: ids.index(end) + 1]
    assert "".join(stream_text(Script(ids, own.vocab_size), PROMPT, **options)) == "the end"
    written = own.core.encode_batch(["<|im_", "end|>"], add_special_tokens=False)  # as plain characters
    script = Script([*own.encode("the "), *written[0].ids, *written[1].ids], own.vocab_size)
    assert "".join(stream_text(script, PROMPT, **options)) == "the "
    with pytest.raises(
        ValueError, match=r"^stop_strings: got '<\|im_end\|>\\n', which holds the special token"
    ):
        generate(script, PROMPT, **{**options, "stop_strings": ["x", "<|im_end|>\n"]})


@pytest.mark.parametrize("length", range(20, 44))
def test_a_character_that_is_not_complete_is_never_given(length: int) -> None:
    pieces = list(stream_text(script(), PROMPT, tokenizer=tokenizer(), max_new_tokens=length))
    whole = tokenizer().decode(IDS[:length])
    assert "".join(pieces) == whole.rstrip(UNKNOWN)
    assert len(pieces) > 5


def test_bytes_that_are_no_character_are_given_once_that_is_certain() -> None:
    """Random bytes: after any four tokens, what is given is all but a few bytes of the decoded text."""
    dice, byte = random.Random(0), tokenizer()
    pool = sorted(set(byte.encode("é你😀")))
    for _ in range(50):
        ids = dice.choices(pool, k=40)
        detokenizer, given = Detokenizer(byte, []), ""
        for n, token in enumerate(ids):
            given += detokenizer.push(token)
            assert len(detokenizer.pending) <= 2 * CONTEXT
            assert byte.decode(ids[: n + 1]).startswith(given)
            assert len(given) >= len(byte.decode(ids[: n + 1])) - 3
    row = RowText(byte, [], ["x"])
    for token in pool:
        row.push(token)
    row.finish()
    assert row.safe == len(pool)


CHINESE = "他说、它企图了解人工智能的架构、它企图了解世界。"
LINES = [
    f"{CHINESE}[架构]。",
    "東京都に住んでいる人々は、毎朝電車に乗る。",
    "नमस्ते दुनिया, यह हिन्दी है।",
    "👩\u200d👩\u200d👧 and 🏳️\u200d🌈, 👍🏽!",
    f"a {UNKNOWN} b {UNKNOWN * 5}构{UNKNOWN}.",
    "架构" * 30 + ".",
]


@cache
def straddling() -> list[Tokenizer]:
    """Byte-level BPEs with tokens that end one character and begin the next."""
    texts = ([CHINESE] * 3, LINES * 2, ["架构架构"] * 3)
    return [train_bpe(text, vocab_size=size) for text in texts for size in (300, 400)]


def ends_of(of: Tokenizer, text: str) -> list[int]:
    """For each token of a text, where the last character ends that it has a byte of."""
    places = [n for n, character in enumerate(text) for _ in character.encode()]
    ends, place = [], 0
    for token in of.encode(text):
        place += len(of.core.id_to_token(token))  # a character stands for a byte
        ends.append(places[place - 1] + 1)
    return ends


@pytest.mark.parametrize("text", LINES)
def test_streamed_text_is_that_of_all_tokens_where_they_straddle_characters(text: str) -> None:
    for of in straddling():
        detokenizer = Detokenizer(of, [])
        pieces = [detokenizer.push(token) for token in of.encode(text)]
        assert "".join(pieces) == text
        places = sorted({0, len(text) // 2, *random.Random(0).choices(range(len(text)), k=12)})
        for stop in {text[place : place + size] for place in places for size in (1, 3)}:
            row, expected = RowText(of, [], [stop]), cut(text, [stop])
            for token in of.encode(text):
                row.push(token)
                if row.found:
                    break
            assert row.found
            assert row.take() == expected
            assert row.safe == sum(end <= len(expected) for end in ends_of(of, text))


def test_a_character_that_the_prompt_begins_is_given() -> None:
    for of, length in ((tokenizer(), 2), (Pieces(), 2)):
        ids = of.encode("你") if isinstance(of, Tokenizer) else [*"你".encode()]
        detokenizer = Detokenizer(of, ids[:length])
        assert "".join(map(detokenizer.push, ids[length:])) == "你"


class Bytes:
    """A tokenizer whose tokens are any bytes."""

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens, self.most = tokens, 0

    def decode(self, ids: Any, *, skip_special_tokens: bool = True) -> str:
        self.most = max(self.most, len(ids))
        return b"".join(self.tokens[i] for i in ids).decode(errors="replace")


@pytest.mark.parametrize("loop", ["架构", UNKNOWN, "👩"])
@pytest.mark.parametrize("cut_at", [1, 2])
def test_the_work_of_a_token_does_not_grow_where_no_token_ends_with_a_character(
    loop: str, cut_at: int
) -> None:
    data = loop.encode()
    of, text = Bytes([data[:cut_at], data[cut_at:] + data[:cut_at], data[cut_at:] + b"."]), loop * 101 + "."
    detokenizer = Detokenizer(of, [])
    assert "".join(map(detokenizer.push, [0, *[1] * 100, 2])) == text
    assert of.most <= 3 * CONTEXT


class Pieces:
    """A sentence-piece decoder: words begin with a mark, the first of a text without its space; bytes may stand in."""

    def __init__(self) -> None:
        import tokenizers
        from tokenizers import decoders, models

        vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
        vocab |= {word: 256 + n for n, word in enumerate(["▁hello", "▁world", "ly", "▁", "</s>"])}
        self.core = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True))
        self.core.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        self.core.add_special_tokens(["</s>"])

    def decode(self, ids: Any, *, skip_special_tokens: bool = True) -> str:
        return self.core.decode(list(ids), skip_special_tokens=skip_special_tokens)


def test_spaces_and_bytes_of_sentence_pieces() -> None:
    decoder = Pieces()

    def streamed(prompt: list[int], ids: list[int]) -> Iterator[str]:
        detokenizer = Detokenizer(decoder, prompt)
        yield from map(detokenizer.push, ids)

    hello, world, ly, end = 256, 257, 258, 260
    assert list(streamed([hello], [world, ly])) == [" world", "ly"]
    assert list(streamed([], [hello, world])) == ["hello", " world"]
    assert list(streamed([hello], [*"你好".encode(), world])) == ["", "", "你", "", "", "好", " world"]
    assert list(streamed([hello], [end, end, world])) == ["", "", " world"]  # special tokens keep the space


@pytest.mark.parametrize("lookup", [None, 8])
def test_streams_give_the_ids_of_generate(lookup: int | None) -> None:
    model = make(torch.float64, eos_token_id=7).train()
    ids, mask = prompts((8, 3))
    row, real = ids[1:], mask[1:]
    options: dict[str, Any] = {"max_new_tokens": 40, "prompt_lookup_num_tokens": lookup}
    expected = model.generate(row, real, **options)[0, 8:].tolist()
    stream = stream_ids(model, row, real, **options)
    first = next(stream)
    assert model.training  # between steps the model is as it was
    assert first + [token for part in stream for token in part] == expected
    sampled = model.generate(row, real, **options, do_sample=True, seed=3)[0, 8:].tolist()
    again = stream_ids(model, row, real, **options, do_sample=True, seed=3)
    assert [token for part in again for token in part] == sampled
    assert list(stream_ids(model, row, real, max_new_tokens=0)) == []


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"input_ids": PROMPT.expand(2, -1)}, "input_ids: got 2 prompts, needs one"),
        ({"num_beams": 2}, "num_beams: got 2, needs 1"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences: got 2, needs 1"),
        ({"tokenizer": None}, "tokenizer: got NoneType"),
        ({"stop_strings": [""]}, "stop_strings: got"),
        ({"temperature": 0.5}, "temperature: shapes sampling"),
    ],
)
def test_streams_refuse_by_name_when_they_are_made(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{complaint}"):
        stream_text(script(), **{"input_ids": PROMPT, "tokenizer": tokenizer(), **options})
    with pytest.raises(TypeError, match="temprature"):
        stream_text(script(), PROMPT, tokenizer=tokenizer(), temprature=1.0)
