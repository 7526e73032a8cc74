"""Language models, chats, preferences and teachers: what the loss is of, packed as one by one, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
import torch.nn.functional as F

from fastattn.constants import IGNORE_INDEX
from fastattn.data.chat import DEFAULT_TEMPLATE, ChatTemplate, encode_dialogue
from fastattn.data.corpora import DataError
from fastattn.data.records import Record
from fastattn.data.tokenization import Tokenizer, train_bpe, train_characters
from fastattn.models import GPT, GPTConfig
from fastattn.tasks import causal_lm, chat, dpo
from fastattn.tasks.distill import Student
from fastattn.tasks.logprobs import logits_of, next_targets, token_losses
from fastattn.tasks.perplexity import evaluate_documents, windows_of

TEXTS = (
    "A cat sat.",
    "The dog sleeps on the mat, and the cat sleeps too.",
    "x",
    "Ünïcode 今天 and so on " * 4,
)
EPS = torch.finfo(torch.float32).eps  # a loss is a float32
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
    return train_bpe(list(TEXTS), 300, special_tokens=["<|im_start|>", "<|im_end|>"])


def model_of(tokenizer: Tokenizer, cls: Any = GPT, kind: str = "learned", **changes: Any) -> Any:
    torch.manual_seed(0)
    fields = {
        **small_models.GPT2,
        **small_models.KINDS[kind],
        "vocab_size": tokenizer.vocab_size,
        "n_embd": 16,
    }
    dropless = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0)
    tokens = {"eos_token_id": tokenizer.eos_id, "bos_token_id": tokenizer.eos_id}
    return cls(GPTConfig(**{**fields, **dropless, **tokens, "n_positions": 64, **changes})).eval()


def records(*fields: dict[str, Any]) -> list[Record]:
    return [Record(f"data: line {i}", each) for i, each in enumerate(fields, 1)]


def batch_of(data: Any) -> dict[str, torch.Tensor]:
    items = [data[i] for i in range(len(data))]
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def loss_by_hand(model: Any, ids: list[int], counted: list[bool]) -> tuple[float, int]:
    """The sum of -ln P over the counted tokens of a sequence read alone, and their number."""
    logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    places = [i for i in range(1, len(ids)) if counted[i]]
    return -sum(float(logprobs[i - 1, ids[i]].detach()) for i in places), len(places)


# Perplexity


@pytest.mark.parametrize(("length", "stride"), [(8, 3), (8, 7), (9, 1), (64, 32)])
@pytest.mark.parametrize("bos", [None, 0])
def test_windows_predict_every_token_once(length: int, stride: int, bos: int | None) -> None:
    for size in range(40):
        ids = list(range(1, size + 1))
        found: list[int] = []
        for window in windows_of(ids, bos, length, stride):
            assert len(window.ids) <= length
            assert window.scored >= 1
            assert bos is None or window.ids[0] == bos
            body = window.ids[bos is not None :]
            assert body == list(range(body[0], body[0] + len(body)))
            found += window.ids[window.scored :]
            before = window.scored - (bos is not None)
            assert not found[: -len(window.ids[window.scored :])] or before >= length - stride - (
                bos is not None
            )
        assert found == (ids if bos is not None else ids[1:])


@pytest.mark.parametrize("named", [True, False])
def test_perplexity_is_that_of_each_document_alone(tokenizer: Tokenizer, named: bool) -> None:
    model = model_of(tokenizer, kind="rotary", bos_token_id=tokenizer.eos_id if named else 10**6)
    front = [tokenizer.eos_id] if named else []
    total, count, size = 0.0, 0, 0
    for text in TEXTS:
        ids = [*front, *tokenizer.encode(text)]
        loss, number = loss_by_hand(model, ids, [True] * len(ids))
        first = b"" if named else tokenizer.decode(ids[:1]).encode()
        total, count, size = (
            total + loss,
            count + number,
            size + (len(text.encode()) - len(first) if number else 0),
        )
    reports = [
        evaluate_documents(model, tokenizer, TEXTS, batch_size=batch, max_length=256) for batch in (1, 2, 8)
    ]
    for report in reports:
        assert report.count == count
        assert report.metrics["loss"] == pytest.approx(total / count, rel=8 * EPS)
        assert report.metrics["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=8 * EPS)
    assert reports[0].metrics["perplexity"] == pytest.approx(math.exp(total / count), rel=64 * EPS)


def test_unknown_characters_are_counted() -> None:
    characters = train_characters(["ab ab"], 20)
    report = evaluate_documents(model_of(characters), characters, ["abz"], max_length=8)
    assert report.metrics["unknown"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("packing", ["best-fit", "blocks"])
def test_the_loss_of_packed_text_is_that_of_documents(tokenizer: Tokenizer, packing: str) -> None:
    model = model_of(tokenizer)
    options = causal_lm.Options(max_length=64, packing=packing)
    examples = causal_lm.examples_of(records(*({"text": text} for text in TEXTS)), options)
    data = causal_lm.training_set(model, tokenizer, examples, options)
    packed = batch_of(data)
    total, count = 0.0, 0
    for row in range(len(data)):
        segments = packed["segment_ids"][row]
        for segment in range(int(segments.max()) + 1):
            ids = packed["input_ids"][row][segments == segment].tolist()
            assert packing != "best-fit" or ids[0] == tokenizer.eos_id
            loss, number = loss_by_hand(model, ids, [True] * len(ids))
            total, count = total + loss, count + number
    assert model(**packed).loss.item() == pytest.approx(total / count, rel=8 * EPS)


# Chat


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
    data = chat_data(tokenizer, model, DEFAULT_TEMPLATE, chat.Options(max_length=128))
    assert (len(data), data.dropped) == (1, 0)
    total, count = 0.0, 0
    template = ChatTemplate(DEFAULT_TEMPLATE, {"eos_token": tokenizer.eos_token})
    for messages in CHATS:
        dialogue = encode_dialogue(tokenizer, template, messages, ends)
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
    with pytest.raises(DataError, match="stands outside of the assistant's part"):
        chat_data(tokenizer, model, MARKED, options)
    with pytest.raises(DataError, match="never be learnt: the chat template does not write it"):
        chat_data(
            tokenizer, model, CHATML, options
        )  # which ends turns with another token than generation does
    with pytest.raises(DataError, match=r"within 8 tokens|is cut before it"):
        chat_data(tokenizer, model, DEFAULT_TEMPLATE, chat.Options(max_length=8))
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


# Preferences


PAIRS = (
    {"prompt": "Say A", "chosen": "A it is", "rejected": "B"},
    {"prompt": "And B", "chosen": "B", "rejected": "no idea at all"},
    {"prompt": "C", "chosen": "see", "rejected": "sea"},
)


def test_the_loss_of_preferences_is_the_papers(tokenizer: Tokenizer) -> None:
    """Against the formula written down, which is that of trl's DPOTrainer for loss_type "sigmoid"."""
    model = model_of(tokenizer, dpo.PreferenceGPT)
    options = dpo.Options(max_length=32, beta=0.3)
    examples = dpo.examples_of(records(*PAIRS), options)
    start = model_of(tokenizer, initializer_range=0.2)
    data = dpo.training_set(start, tokenizer, examples, options)
    model.beta = options.beta
    logps: list[list[tuple[float, float]]] = []
    for pair in PAIRS:
        prompt = tokenizer.encode(pair["prompt"])
        each = []
        for name in ("chosen", "rejected"):
            ids = [*prompt, *tokenizer.encode(pair[name]), tokenizer.eos_id]
            marks = [False] * len(prompt) + [True] * (len(ids) - len(prompt))
            each.append((-loss_by_hand(model, ids, marks)[0], -loss_by_hand(start, ids, marks)[0]))
        logps.append(each)
    losses = []
    for (chosen, chosen_start), (rejected, rejected_start) in logps:
        logits = (chosen - rejected) - (chosen_start - rejected_start)
        losses.append(-math.log(1 / (1 + math.exp(-0.3 * logits))))
    for size in (1, 2, 3):
        found = 0.0
        for first in range(0, 3, size):
            batch = data.collate([data[i] for i in range(first, min(first + size, 3))])
            output = model(**batch)
            found += output.loss.item() * len(batch["labels"]) / 3
        assert found == pytest.approx(sum(losses) / 3, rel=64 * EPS)
    model.label_smoothing = 1.0  # every preference the wrong way round
    swapped = model(**data.collate([data[0]])).loss.item()
    assert swapped == pytest.approx(
        losses[0] + 0.3 * ((logps[0][0][0] - logps[0][1][0]) - (logps[0][0][1] - logps[0][1][1])),
        rel=64 * EPS,
    )


def test_preferences_begin_at_ln_2_and_are_followed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model_of(tokenizer).save_pretrained(tmp_path, tokenizer=tokenizer)
    options = dpo.Options(max_length=32, beta=0.5)
    examples = dpo.examples_of(records(*PAIRS), options)
    model = dpo.new_model(tmp_path, examples, options, tokenizer)
    data = dpo.training_set(model, tokenizer, examples, options)
    batch = data.collate([data[i] for i in range(3)])
    assert model.train()(**batch).loss.item() == pytest.approx(math.log(2), rel=64 * EPS)
    before = dpo.evaluate(model, tokenizer, examples, options=options)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(12):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = dpo.evaluate(model, tokenizer, examples, options=options, batch_size=1)
    assert (model.eval()(**batch).margins > 0.5).all()  # every chosen answer gained on its rejected one
    assert after.metrics["margin"] > before.metrics["margin"] + 1
    assert after.metrics["accuracy"] >= before.metrics["accuracy"]


# Teachers


@pytest.mark.parametrize("kind", ["learned", "gemma"])
def test_a_students_loss_is_the_formula(tokenizer: Tokenizer, kind: str) -> None:
    student, teacher = (
        model_of(tokenizer, Student, kind),
        model_of(tokenizer, kind=kind, initializer_range=0.2),
    )
    student.train().learn_from(teacher, weight=0.25, temperature=2.0)
    options = causal_lm.Options(max_length=48)
    examples = causal_lm.examples_of(records(*({"text": text} for text in TEXTS)), options)
    batch = batch_of(causal_lm.training_set(student, tokenizer, examples, options))
    targets = next_targets(batch["labels"], batch["segment_ids"])
    counted = targets != IGNORE_INDEX
    with torch.no_grad():
        seen = {"input_ids": batch["input_ids"], "segment_ids": batch["segment_ids"]}
        ours, theirs = (m(**seen).logits[counted].double() for m in (student, teacher))
    hard = F.cross_entropy(ours, targets[counted])
    soft = F.kl_div((ours / 2).log_softmax(-1), (theirs / 2).softmax(-1), reduction="batchmean") * 4
    loss = student(**batch).loss
    assert loss.item() == pytest.approx(float(0.75 * hard + 0.25 * soft), rel=64 * EPS)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert len(list(student.parameters())) == len(
        list(teacher.parameters())
    )  # the teacher's are not among them
    assert student.eval()(**batch).loss.item() == pytest.approx(float(hard), rel=64 * EPS)


def test_losses_of_tokens_are_those_of_their_logits(tokenizer: Tokenizer) -> None:
    for kind in ("learned", "gemma"):
        model = model_of(tokenizer, kind=kind)
        hidden, targets = torch.randn(9, 16), torch.arange(9)
        expected = F.cross_entropy(logits_of(model, hidden), targets, reduction="none")
        torch.testing.assert_close(token_losses(model, hidden, targets), expected)


# Bad input


def test_bad_conversations_and_preferences_are_named(tokenizer: Tokenizer) -> None:
    model = model_of(tokenizer)
    for fields, message in (
        ({"messages": [{"role": "user", "content": "x"}]}, "data: line 1: the assistant says nothing"),
        ({"messages": []}, "data: line 1: messages is no list of messages"),
        ({"text": "x"}, "data: line 1 has no 'messages'"),
        ({"prompt": "x"}, "data: line 1 has no 'completion'"),
    ):
        with pytest.raises(DataError, match=message):
            chat.examples_of(records(fields), chat.Options())
    for fields, message in (
        ({"prompt": "x", "chosen": "y"}, "data: line 1 has no 'rejected'"),
        ({"prompt": "x", "chosen": "y", "rejected": "y"}, "data: line 1: chosen and rejected are the same"),
        ({"prompt": [{}], "chosen": "y", "rejected": "z"}, "data: line 1: prompt is no list"),
        ({"prompt": "x", "chosen": [], "rejected": "z"}, "data: line 1: chosen does not end with a message"),
    ):
        with pytest.raises(DataError, match=message):
            dpo.examples_of(records(fields), dpo.Options())
    with pytest.raises(DataError, match=r"^chat template: is not Jinja"):
        ChatTemplate("{% for %}", {})
    with pytest.raises(DataError, match=r"^data: line 1: chat template: no system role"):
        chat_data(tokenizer, model, "{{ raise_exception('no system role') }}", chat.Options())
    with pytest.raises(DataError, match="changes what is written before"):
        chat_data(tokenizer, model, "{{ messages | length }}{{ messages[-1]['content'] }}", chat.Options())
    with pytest.raises(DataError, match=r"^task.max_length: got 65, the model has 64 positions"):
        causal_lm.training_set(model, tokenizer, [], causal_lm.Options(max_length=65))
    with pytest.raises(DataError, match=r"^task.stride: got 64"):
        causal_lm.evaluate(model, tokenizer, [], options=causal_lm.Options(stride=64))
    with pytest.raises(DataError, match=r"^--teacher: its tokenizer has other tokens"):
        causal_lm.attach_teacher(
            model_of(tokenizer, Student), tokenizer, (model, train_characters(["ab"])), causal_lm.Options()
        )
    with pytest.raises(DataError, match=r"^--model: got a preset's name"):
        dpo.new_model(GPTConfig(), [], dpo.Options(), tokenizer)
