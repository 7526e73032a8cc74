"""Whether a model has an embedding for every token of a tokenizer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import tokenizers

from fastattn.data.corpora import DataError


def check_vocabulary(name: str, core: tokenizers.Tokenizer, sizes: Mapping[str, int]) -> dict[str, int]:
    """The added tokens, with their ids, that a part of a model has no embedding for; a warning names them.

    Folders of models have such tokens, for images as an example, which texts do not hold.

    Args:
        name: of the tokenizer, the beginning of messages.
        core: the tokenizer.
        sizes: the vocabulary size of each part of the model, as {"model": V}.

    Raises:
        DataError: the vocabulary does not fit even without added tokens.
    """
    largest = max(core.get_vocab(with_added_tokens=False).values(), default=-1)
    for part, size in sizes.items():
        if largest >= size:
            raise DataError(
                f"{name}: has ids up to {largest}, the {part}'s vocab_size is {size}: it is another model's"
            )
    least = min(sizes.values())
    beyond = {token: i for token, i in core.get_vocab(with_added_tokens=True).items() if i >= least}
    if beyond:
        first = min(beyond, key=beyond.__getitem__)
        more = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        warnings.warn(
            f"{name}: has the added token {first!r}{more} beyond the model's vocab_size of {least}; texts with such a "
            f"token are refused",
            stacklevel=2,
        )
    return beyond


def check_texts_without(beyond: Iterable[str], texts: Iterable[str]) -> None:
    """Raise DataError for a text that holds one of these tokens, which the model has no embedding for."""
    tokens = list(beyond)
    if not tokens:
        return
    for text in texts:
        for token in tokens:
            if token in text:
                raise DataError(f"data: a text holds {token!r}, a token that the model has no embedding for")
