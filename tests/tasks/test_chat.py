"""Chats: the template's text, the loss on what the assistant says, and ends of turns that would never be learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from generative_cases import EPS, batch_of, loss_by_hand, make_tokenizer, model_of, records

from fastattn.constants import IGNORE_INDEX
from fastattn.data.chat import DEFAULT_TEMPLATE, ChatTemplate, encode_dialogue
from fastattn.data.corpora import DataError
from fastattn.data.tokenization import Tokenizer
from fastattn.tasks import chat
from fastattn.tasks.logprobs import next_targets

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<A>{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{{ eos_token }}{% else %}<U>{{ m['content'] }}{% endif %}{% endfor %}"
)
CHATS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello you"}],
    [
        {"role": "system", "content": "Be short"},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two"},
        {"role": "assistant", "content": "2!"},
    ],
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


def test_the_assistants_tokens_alone_are_learnt(tokenizer: Tokenizer) -> None:
    for source, end in ((CHATML, "<|im_end|>"), (DEFAULT_TEMPLATE, tokenizer.eos_token)):
        template = ChatTemplate(source, {"eos_token": tokenizer.eos_token})
        ends = [tokenizer.core.token_to_id(end)]
        dialogue = encode_dialogue(tokenizer, template, CHATS[1], ends)
        text = template.render(CHATS[1])
        assert tokenizer.decode(dialogue.ids, skip_special_tokens=False) == text
        said = [token for token, marked in zip(dialogue.ids, dialogue.said) if marked]
        assert tokenizer.decode(said, skip_special_tokens=False).split(end) in (
            ["1", "2!", ""],
            [" 1", " 2!", ""],
        )
        assert not template.render(CHATS[1][:2], add_generation_prompt=True).endswith("1")


def test_a_template_may_say_what_is_generated(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(MARKED, {"eos_token": "<|endoftext|>"})
    text, spans = template.spans(CHATS[1])
    assert text == template.render(CHATS[1]) == "<U>Be short<U>One<A>1<|endoftext|><U>Two<A>2!<|endoftext|>"
    assert [text[a:b] for a, b in spans] == ["1", "2!"]


def test_rendering_is_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for source in (CHATML, DEFAULT_TEMPLATE, MARKED):
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / "chat_template.jinja").write_text(source, encoding="utf-8")
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        ours = ChatTemplate.of(Tokenizer.from_pretrained(tmp_path))
        for messages in CHATS:
            for prompt in (False, True):
                expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
                assert ours.render(messages, add_generation_prompt=prompt) == expected
        if ours.marks_generation:
            masks = [
                theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
                for messages in CHATS
            ]
            found = [encode_dialogue(tokenizer, ours, messages, ()) for messages in CHATS]
            assert [mask["input_ids"] for mask in masks] == [dialogue.ids for dialogue in found]
            assert [mask["assistant_masks"] for mask in masks] == [list(map(int, d.said)) for d in found]


def chat_data(
    tokenizer: Tokenizer, model: Any, source: str | None, options: chat.Options, *chats: Any
) -> Any:
    tokenizer.chat_template = source
    try:
        examples = chat.examples_of(records(*({"messages": each} for each in chats or CHATS)), options)
        return chat.training_set(model, tokenizer, examples, options)
    finally:
        tokenizer.chat_template = None


def test_the_loss_of_packed_chats_is_that_of_each(tokenizer: Tokenizer) -> None:
    model = model_of(tokenizer, n_positions=128)
    ends = [tokenizer.eos_id]
    template = ChatTemplate(DEFAULT_TEMPLATE, {"eos_token": tokenizer.eos_token})
    encoded = [encode_dialogue(tokenizer, template, messages, ends) for messages in CHATS]
    data = chat_data(tokenizer, model, DEFAULT_TEMPLATE, chat.Options(max_length=128))
    assert (len(data), data.dropped, data.cut_rows) == (1, 0, 0)
    cut = chat_data(tokenizer, model, DEFAULT_TEMPLATE, chat.Options(max_length=60))
    assert (cut.dropped, cut.cut_rows) == (len(encoded[1].ids) - 60, 1)
    total, count = 0.0, 0
    for dialogue in encoded:
        loss, number = loss_by_hand(model, dialogue.ids, dialogue.said)
        total, count = total + loss, count + number
    assert model(**batch_of(data)).loss.item() == pytest.approx(total / count, rel=8 * EPS)
    examples = chat.examples_of(records(*({"messages": each} for each in CHATS)), chat.Options())
    reports = [chat.evaluate(model, tokenizer, examples, batch_size=size) for size in (1, 4)]
    for report in reports:
        assert (report.count, report.metrics["loss"]) == (count, pytest.approx(total / count, rel=8 * EPS))


def test_an_end_of_turn_that_would_never_be_learnt_is_refused(tokenizer: Tokenizer) -> None:
    model = model_of(tokenizer, n_positions=128)
    options = chat.Options(max_length=128)
    with pytest.raises(DataError, match="is outside of the assistant's part"):
        chat_data(tokenizer, model, MARKED, options)
    with pytest.raises(DataError, match="is never a label: the chat template does not write it"):
        chat_data(
            tokenizer, model, CHATML, options
        )  # which ends turns with another token than generation does
    with pytest.raises(DataError, match=r"within its first 8 tokens|is truncated before it"):
        chat_data(tokenizer, model, DEFAULT_TEMPLATE, chat.Options(max_length=8))
    (truncated,) = chat.examples_of(records({"prompt": "say", "completion": "hello " * 40}), options)
    short = chat.Options(max_length=32)
    tokenizer.chat_template = DEFAULT_TEMPLATE
    with pytest.raises(DataError, match="is truncated before it"):
        chat.training_set(model, tokenizer, [truncated], short)
    assert chat.dev_set(model, tokenizer, [truncated], short).num_targets()  # nothing is learnt from it
    tokenizer.chat_template = None
    model.config.eos_token_id = tokenizer.core.token_to_id("<|im_end|>")
    assert chat_data(tokenizer, model, CHATML, options).num_targets()


def test_a_padding_token_that_ends_turns_does_not_hide_them(tokenizer: Tokenizer) -> None:
    same = Tokenizer(tokenizer.core, eos_token=tokenizer.eos_token)
    assert same.pad_id == same.eos_id
    model = model_of(same, n_positions=128)
    data = chat_data(same, model, DEFAULT_TEMPLATE, chat.Options(max_length=128))
    assert int((next_targets(data[0]["labels"][None]) == same.eos_id).sum()) == 3  # one for each turn

    class Masked:
        def __len__(self) -> int:
            return len(data)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            row = data[index]
            return {**row, "labels": row["labels"].masked_fill(row["input_ids"] == same.pad_id, IGNORE_INDEX)}

    with pytest.raises(DataError, match=r"the padding token is '<.endoftext.>' too"):
        chat.check_ends(Masked(), same, [same.eos_id])


def test_bad_conversations_are_named(tokenizer: Tokenizer) -> None:
    model = model_of(tokenizer)
    for fields, message in (
        ({"messages": [{"role": "user", "content": "x"}]}, "data: line 1: has no message of the assistant"),
        ({"messages": []}, "data: line 1: messages is not a list of messages"),
        ({"text": "x"}, "data: line 1 has no 'messages'"),
        ({"prompt": "x"}, "data: line 1 has no 'completion'"),
    ):
        with pytest.raises(DataError, match=message):
            chat.examples_of(records(fields), chat.Options())
    with pytest.raises(DataError, match=r"^chat template: is not Jinja"):
        ChatTemplate("{% for %}", {})
    with pytest.raises(DataError, match=r"^data: line 1: chat template: no system role"):
        chat_data(tokenizer, model, "{{ raise_exception('no system role') }}", chat.Options())
    with pytest.raises(DataError, match="changes the text before it"):
        chat_data(tokenizer, model, "{{ messages | length }}{{ messages[-1]['content'] }}", chat.Options())


def test_a_sample_answers_a_message(tokenizer: Tokenizer) -> None:
    """Conversations that the assistant begins are shown from its next answer on, or another one is."""
    begins = [{"role": "assistant", "content": "Welcome"}]
    model = model_of(tokenizer)

    def shown(*chats: list[dict[str, str]]) -> str:
        examples = chat.examples_of(records(*({"messages": each} for each in chats)), chat.Options())
        return chat.sample(model, tokenizer, examples, chat.Options())

    assert shown(CHATS[0]).startswith("Hi -> ")
    assert shown([*begins, *CHATS[0]]).startswith("Hi -> ")
    assert shown(begins, CHATS[0]) == shown(CHATS[0])
    assert shown(begins).startswith("no sample: ")
