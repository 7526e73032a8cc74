"""The fields of preferences: answers, and the messages that two conversations begin with."""

from __future__ import annotations

from typing import Any

from fastattn.data.chat import ASSISTANT
from fastattn.data.corpora import DataError
from fastattn.data.records import Record, required, text_of

ANSWERS = ("chosen", "rejected")


def shared_messages(record: Record) -> list[Any]:
    """The messages that the conversations of both answers begin with, each one message longer.

    Raises:
        DataError: the answers are no conversations, they begin differently, or go on for more than one message.
    """
    both = [required(record, name) for name in ANSWERS]
    if not all(isinstance(each, list) for each in both):
        raise DataError(
            f"{record.where}: has no prompt, needs one, or chosen and rejected as lists of messages"
        )
    shared = 0
    while shared < min(map(len, both)) and both[0][shared] == both[1][shared]:
        shared += 1
    if shared == 0:
        raise DataError(
            f"{record.where}: has no prompt, and chosen and rejected begin with different messages"
        )
    for name, each in zip(ANSWERS, both):
        if len(each) != shared + 1:
            raise DataError(
                f"{record.where}: {name} has {len(each) - shared} messages behind the {shared} that both answers "
                f"begin with, needs one"
            )
    return both[0][:shared]


def answer_of(record: Record, name: str) -> str:
    """An answer that is a text, or the last of a list of messages; DataError where that is not the assistant's."""
    value = required(record, name)
    if not isinstance(value, list):
        return text_of(record, name)
    last = value[-1] if value else None
    if (
        not isinstance(last, dict)
        or last.get("role") != ASSISTANT
        or not isinstance(last.get("content"), str)
    ):
        raise DataError(f'{record.where}: {name} does not end with a message of the assistant with "content"')
    return text_of(Record(record.where, {name: last["content"]}), name)
