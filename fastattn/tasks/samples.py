"""A line that shows a model at work on a held-out example; tasks whose modules have a `sample` show that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from fastattn.data.chat import ASSISTANT
from fastattn.data.encoding import MASK_SPELLINGS
from fastattn.evaluation.words import is_unspaced
from fastattn.tasks import causal_lm, chat, classify, dpo, embed, fill, masked_lm, qa, tag
from fastattn.tasks.batches import on_one_line
from fastattn.tasks.perplexity import template_front

Sample = Callable[[Any, Any, Sequence[Any], Any], str]
SHOWN_CHARACTERS = 80  # of an input
TOP_K = 3  # most labels and tokens
READ_CHARACTERS = 1000  # of a document
AROUND_MASK = 8  # words on each side of a mask, or characters of scripts without spaces


def sample_of(task: ModuleType) -> Sample:
    """A function of model, tokenizer, held-out examples and the task's options that returns a text.

    An example that the model cannot read gives a text that says so, as a sample is no reason to end a run.
    """
    made: Sample = getattr(task, "sample", None) or SAMPLES[task]

    def sample(model: Any, tokenizer: Any, examples: Sequence[Any], options: Any) -> str:
        try:
            return made(model, tokenizer, examples, options)
        except ValueError as error:
            return f"no sample: {on_one_line(str(error))}"

    return sample


def labels(model: Any, tokenizer: Any, examples: Sequence[Any], options: Any) -> str:
    """The first text and its likeliest labels."""
    first = examples[0]
    pair = {} if first.text_pair is None else {"text_pair": first.text_pair}
    (found,) = classify.predict(model, tokenizer, [{"text": first.text, **pair}], top_k=TOP_K)
    return _shown(" / ".join((first.text, *pair.values())), classify.line(found))


def entities(model: Any, tokenizer: Any, examples: Sequence[Any], options: Any) -> str:
    """The first sentence and its entities."""
    words = examples[0].tokens
    text = ("" if all(is_unspaced(word[0]) for word in words) else " ").join(words)
    (found,) = tag.predict(model, tokenizer, [{"text": text}])
    return _shown(text, tag.line(found) or "no entity")


def answer(model: Any, tokenizer: Any, examples: Sequence[Any], options: Any) -> str:
    """The first question and its answer."""
    first = examples[0]
    none = options.no_answer == "yes" or (
        options.no_answer == "auto" and not all(each.answers for each in examples)
    )
    asked = [{"question": first.question, "context": first.context}]
    (found,) = qa.predict(model, tokenizer, asked, no_answer=none)
    return _shown(first.question, qa.line(found))


def masked_word(model: Any, tokenizer: Any, examples: Sequence[Any], options: Any) -> str:
    """The beginning of the first document with a mask, the likeliest tokens there, and the word that it is for."""
    beginnings = (on_one_line(each.text[:READ_CHARACTERS]) for each in examples)
    text = next(filter(None, beginnings), "-")
    unspaced = is_unspaced(text[0])
    parts = list(text) if unspaced else text.split()
    place = min(len(parts) // 2, AROUND_MASK)
    word, parts[place] = parts[place], MASK_SPELLINGS[0]
    masked = ("" if unspaced else " ").join(parts[: place + AROUND_MASK + 1])
    (found,) = fill.predict(model, tokenizer, [{"text": masked}], top_k=TOP_K)
    return f"{_shown(masked, fill.line(found), len(masked))} ({word})"


def nearness(model: Any, tokenizer: Any, examples: Sequence[Any], options: Any) -> str:
    """The first text with the cosine of its positive, and of the first text that is another's."""
    first = examples[0]
    other = next((each.positive for each in examples if each.positive != first.positive), None)
    texts = [first.text, first.positive, *([] if other is None else [other])]
    found = embed.predict(model, tokenizer, [{"text": text} for text in texts])
    vectors = torch.tensor([each["embedding"] for each in found], device="cpu")
    cosines = cosine_similarity(vectors[:1], vectors[1:]).tolist()
    near = (f"{cosine:.4f} {_short(text)}" for text, cosine in zip(texts[1:], cosines))
    return _shown(first.text, "\t".join(near))


def preferred(model: Any, tokenizer: Any, examples: Sequence[Any], options: Any) -> str:
    """The first prompt and the model's greedy answer."""
    first = examples[0]
    prompt = first.prompt
    if tokenizer.chat_template is None:
        front, ids = template_front(tokenizer), tokenizer.encode(prompt)
        ids = ids if ids[: len(front)] == front else [*front, *ids]
        return _shown(prompt, causal_lm.written(model, tokenizer, ids, prompt=False))
    messages = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    dialogue = (*messages, {"role": ASSISTANT, "content": first.chosen})
    return chat.sample(model, tokenizer, [chat.Example(first.where, dialogue)], chat.Options())


SAMPLES: dict[ModuleType, Sample] = {
    classify: labels,
    tag: entities,
    qa: answer,
    masked_lm: masked_word,
    embed: nearness,
    dpo: preferred,
}


def _shown(given: str, found: str, most: int = SHOWN_CHARACTERS) -> str:
    return f"{_short(given, most)} -> {on_one_line(found.replace(chr(9), ', '))}"


def _short(text: str, most: int = SHOWN_CHARACTERS) -> str:
    text = on_one_line(text)
    return text if len(text) <= most else f"{text[:most]}..."
