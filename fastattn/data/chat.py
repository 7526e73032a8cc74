"""Conversations as tokens: the tokenizer's chat template, and the assistant's tokens."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

from fastattn.data.corpora import DataError
from fastattn.data.tokenization import Tokenizer

ASSISTANT = "assistant"
# For a tokenizer without a template: roles in words, and the end-of-text token after the assistant's text.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token + '\\n' }}"
    "{% else %}{{ message['role'] | capitalize + ': ' + message['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_GENERATION = ("{% generation", "{%- generation")
_MARKS = (
    "\U000f0001",
    "\U000f0002",
)  # private-use characters around the assistant's part of a rendered template

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Dialogue:
    """A conversation's tokens.

    Attributes:
        ids: the tokens.
        said: for each, whether it is the assistant's.
    """

    ids: list[int]
    said: list[bool]


class ChatTemplate:
    """Renders conversations as transformers does, and finds the assistant's part of them.

    Args:
        source: the template in Jinja. Blocks {% generation %} ... {% endgeneration %} mark the assistant's text;
            without any, it is what a message adds to the conversation before it and the prompt for the assistant.
        tokens: special tokens that the source uses, as bos_token.

    Raises:
        DataError: the source is not Jinja, or the package jinja2 is missing.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        self.source, self.tokens = source, dict(tokens)
        self.marks_generation = any(word in source for word in _GENERATION)
        self._template = _compiled(source)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """The tokenizer's template, else DEFAULT_TEMPLATE."""
        tokens = {
            "eos_token": tokenizer.eos_token,
            "pad_token": tokenizer.pad_token,
            **tokenizer.special_texts(),
        }
        return cls(tokenizer.chat_template or DEFAULT_TEMPLATE, tokens)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The conversation as text; with `add_generation_prompt`, up to the start of the assistant's next message.

        Args:
            messages: dicts with "role" and "content".
            add_generation_prompt: whether the assistant's next message begins at the end.

        Raises:
            DataError: the template raises an error for the messages.
        """
        return _without_marks(self._render(messages, add_generation_prompt))

    def spans(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and the spans of the assistant's characters, by first and last (exclusive).

        Raises:
            DataError: the template raises an error for the messages, or the text of earlier messages changes when a
                message follows, so that the assistant's part is unknown.
        """
        marked = self._render(messages, False)
        if self.marks_generation:
            return _marked_spans(marked)
        text = _without_marks(marked)
        found = []
        for number, message in enumerate(messages):
            if message.get("role") != ASSISTANT:
                continue
            before = self.render(messages[:number], add_generation_prompt=True)
            whole = self.render(messages[: number + 1])
            if not (whole.startswith(before) and text.startswith(whole)):
                raise DataError(
                    f"chat template: message {number + 1} changes the text before it or is changed by the text "
                    f"after it, so the assistant's tokens are unknown; the template needs {{% generation %}} blocks"
                )
            found.append((len(before), len(whole)))
        return text, found

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None,
                **self.tokens,
            )  # fmt: skip
        except Exception as error:  # from jinja2 or from expressions of the template
            raise DataError(f"chat template: {' '.join(str(error).split())}") from None


def encode_dialogue(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message], ends: Collection[int]
) -> Dialogue:
    """A conversation's tokens; the assistant's are those that begin in its text, up to its last end of turn.

    Args:
        tokenizer: turns the rendered conversation into tokens, without adding special ones.
        template: renders the conversation.
        messages: dicts with "role" and "content".
        ends: ids of tokens that end generation. Text that the template writes after them, such as a line end, is not
            the assistant's.

    Raises:
        DataError: the template raises an error for the messages, or does not tell which text is the assistant's.
    """
    text, spans = template.spans(messages)
    encoding = tokenizer.core.encode(text, add_special_tokens=False)
    said = [False] * len(encoding.ids)
    place = 0
    for first, last in spans:
        while place < len(said) and encoding.offsets[place][0] < first:
            place += 1
        begin = place
        while place < len(said) and encoding.offsets[place][0] < last:
            place += 1
        stops = [i for i in range(begin, place) if encoding.ids[i] in ends]
        for i in range(begin, stops[-1] + 1 if stops else place):
            said[i] = True
    return Dialogue(list(encoding.ids), said)


def _marked_spans(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks, and the spans between them."""
    opening, closing = _MARKS
    pieces: list[str] = []
    spans = []
    length = 0
    for number, part in enumerate(marked.split(opening)):
        said, closed, rest = part.partition(closing)
        if number:
            spans.append((length, length + len(said)))
        pieces += [said, rest]
        length += len(said) + len(rest)
        assert bool(number) == bool(closed)
    return "".join(pieces), spans


def _without_marks(text: str) -> str:
    for mark in _MARKS:
        text = text.replace(mark, "")
    return text


def _compiled(source: str) -> Any:
    try:
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise DataError("chat template: needs jinja2: pip install 'fastattn[train]'") from None

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}: its text between marks."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_between_marks", [])
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _between_marks(self, caller: Any) -> str:
            return _MARKS[0] + caller() + _MARKS[1]

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise DataError(f"chat template: is not Jinja ({' '.join(str(error).split())})") from None


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> NoReturn:
    raise ValueError(message)
