"""The endpoints of encoders, /v1/embeddings, /rerank, /classify and /predict, and /tokenize of every model."""

from __future__ import annotations

import asyncio
import base64
import math
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest

from fastattn.console import InputError
from fastattn.serve.completions import check_text, dialogue_ids
from fastattn.serve.encoders import Job
from fastattn.serve.errors import ApiError, of_exception, of_failure
from fastattn.serve.http import new_id, unless_gone
from fastattn.serve.json_text import beside_loop
from fastattn.serve.options import ServeOptions
from fastattn.serve.schemas import (
    ClassifyBody,
    EmbeddingBody,
    EncoderBody,
    PredictBody,
    RerankBody,
    TokenizeBody,
)
from fastattn.serve.served import Decoder, Encoder
from fastattn.tasks import classify, embed, predict
from fastattn.tasks.batches import label_name

Found = list[dict[str, Any]]


async def run(
    http: HttpRequest,
    model: Encoder,
    examples: list[dict[str, Any]],
    limits: ServeOptions,
    options: dict[str, Any] | None = None,
    fits: Callable[[Encoder, list[int]], int] | None = None,
) -> tuple[Found, int]:
    """The predictions of the model's task for examples, and how many tokens these are.

    `fits` gives the most tokens of an example that are read, from the model and the tokens of each, or refuses them;
    without it what the model does not read is left out.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Found] = loop.create_future()

    def settle(result: Found | Exception) -> None:
        if answer.done():
            return
        if isinstance(result, Exception):
            answer.set_exception(of_failure(result))
        else:
            answer.set_result(result)

    def on_done(result: Found | Exception) -> None:
        loop.call_soon_threadsafe(settle, result)

    ids, longest = await run_in_threadpool(ids_of, model, examples), model.longest
    tokens = [len(each) for each in ids]
    most = longest if fits is None else fits(model, tokens)
    if model.task is embed:  # which takes ids, so that a text is tokenised once
        examples = [{"ids": each} if len(each) <= most else example for each, example in zip(ids, examples)]
    tokens = [min(count, most) for count in tokens]
    shorter = {"max_length": most} if most < longest else {}
    deadline = time.monotonic() + limits.timeout
    job = Job(examples, tokens, {**(options or {}), **shorter}, on_done, deadline)
    try:
        model.worker.submit(job)
    except Exception as error:
        raise of_exception(error) from None
    found = await unless_gone(http, answer, job.cancelled.set)
    if found is None:
        raise ApiError(499, "the client is gone")
    return found, sum(tokens)


def ids_of(model: Encoder, examples: Sequence[dict[str, Any]]) -> list[list[int]]:
    """The tokens of each example, all of them."""
    if examples and "ids" in examples[0]:
        return [each["ids"] for each in examples]
    texts = [list(each.values()) for each in examples]
    if model.task is embed:  # behind the folder's prompt
        texts = [[text] for text in model.model.prepared([each[0] for each in texts])]
    encoded = model.core.encode_batch([t[0] if len(t) == 1 else tuple(t[:2]) for t in texts])
    return [each.ids for each in encoded]


def fitting(
    body: EncoderBody, examples: Sequence[dict[str, Any]], names: Sequence[str]
) -> Callable[[Encoder, list[int]], int]:
    """What `run` takes as `fits` for the examples of a body, each of which stands under a name of it.

    A text with more tokens than the model reads is refused, unless the body asks for truncation. Token ids are not
    truncated: they would lose the special tokens at their end.
    """
    pairs, ids = "text_pair" in examples[0], "ids" in examples[0]

    def fits(model: Encoder, tokens: list[int]) -> int:
        longest, asked = model.longest, body.truncate_prompt_tokens
        least = model.core.num_special_tokens_to_add(pairs) + 1
        if asked is not None and asked != -1 and not least <= asked <= longest:
            message = f"truncate_prompt_tokens: got {asked}, needs {least} to {longest}, or -1 for {longest}"
            raise ApiError(400, message, param="truncate_prompt_tokens")
        most = longest if asked is None or asked == -1 else asked
        if (asked is None or ids) and max(tokens) > most:
            count = max(tokens)
            name = names[tokens.index(count)]
            how = "" if ids else "; with truncate_prompt_tokens: -1 it reads the first ones"
            message = f"{name}: got {count} tokens, this model reads {most} at most{how}"
            raise ApiError(400, message, param=name, code="context_length_exceeded")
        return most

    return fits


def texts_of(given: Any, limits: ServeOptions, name: str = "input") -> list[str]:
    """The texts of a body."""
    texts = [given] if isinstance(given, str) else list(given)
    if not texts or len(texts) > limits.max_inputs:
        raise ApiError(400, f"{name}: got {len(texts)} texts, needs 1 to {limits.max_inputs}", param=name)
    for text in texts:
        if not isinstance(text, str):
            raise ApiError(400, f"{name}: needs texts, or lists of token ids, and not both", param=name)
        check_text(name, text)
        if not text.strip():
            raise ApiError(400, f"{name}: got an empty text", param=name)
    return texts


def inputs_of(given: Any, model: Encoder, limits: ServeOptions) -> list[dict[str, Any]]:
    """The examples of /v1/embeddings: texts, or token ids, which are read as they are, special tokens and all."""
    one = isinstance(given, str) or (given and isinstance(given[0], int))
    listed = [given] if one else list(given)
    if not listed or isinstance(listed[0], str):
        return [{"text": text} for text in texts_of(listed, limits)]
    if len(listed) > limits.max_inputs:
        raise ApiError(400, f"input: got {len(listed)}, needs 1 to {limits.max_inputs}", param="input")
    size = model.model.config.vocab_size
    for ids in listed:
        if not ids:
            raise ApiError(400, "input: got an empty list of token ids, needs one at least", param="input")
        if not all(0 <= token < size for token in ids):
            raise ApiError(400, f"input: needs token ids from 0 to {size - 1}", param="input")
    return [{"ids": ids} for ids in listed]


def usage_of(tokens: int) -> dict[str, Any]:
    """The usage object of an endpoint that makes no tokens."""
    return {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}


async def embeddings(
    http: HttpRequest, body: EmbeddingBody, model: Encoder, limits: ServeOptions
) -> dict[str, Any]:
    """Vectors of texts. `dimensions` keeps the first ones and gives them length 1 again."""
    if model.task is not embed:
        raise wrong_head(model, "embeddings")
    width = model.model.config.hidden_size
    if body.dimensions is not None and body.dimensions > width:
        raise ApiError(400, f"dimensions: got {body.dimensions}, needs {width} at most", param="dimensions")
    examples = inputs_of(body.input, model, limits)
    fits = fitting(body, examples, ["input"] * len(examples))
    found, tokens = await run(http, model, examples, limits, fits=fits)

    def shown(vector: list[float]) -> Any:
        vector = shortened(vector, body.dimensions)
        if body.encoding_format == "float":
            return vector
        return base64.b64encode(array("f", vector).tobytes()).decode("ascii")

    def entries() -> Found:
        return [
            {"object": "embedding", "index": index, "embedding": shown(each["embedding"])}
            for index, each in enumerate(found)
        ]

    data = await beside_loop(len(found) * width, entries)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model.name, "usage": usage}


def shortened(vector: list[float], dimensions: int | None) -> list[float]:
    """The first numbers of a vector, scaled to length 1."""
    if dimensions is None or dimensions == len(vector):
        return vector
    kept = vector[:dimensions]
    norm = math.sqrt(sum(x * x for x in kept))
    return [x / norm for x in kept] if norm else kept


async def rerank(http: HttpRequest, body: RerankBody, model: Encoder, limits: ServeOptions) -> dict[str, Any]:
    """Documents by their relevance: a classifier of pairs with one label scores them, or the cosine of embeddings."""
    documents = texts_of(body.documents, limits, "documents")
    (query,) = texts_of(body.query, limits, "query")
    if model.task is embed:
        examples = [{"text": text} for text in (query, *documents)]
        fits = fitting(body, examples, ["query", *["documents"] * len(documents)])
        found, tokens = await run(http, model, examples, limits, fits=fits)
        width = model.model.config.hidden_size
        vectors = [each["embedding"] for each in found]
        scores = await beside_loop(len(found) * width, lambda: cosines(vectors))
    elif model.task is classify and model.model.config.num_labels == 1:
        examples = [{"text": query, "text_pair": text} for text in documents]
        fits = fitting(body, examples, ["documents"] * len(documents))
        found, tokens = await run(http, model, examples, limits, fits=fits)
        scores = [each["labels"][0]["score"] for each in found]
    else:
        raise wrong_head(model, "/rerank")
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[: body.top_n or None]
    results = [{"index": i, "document": {"text": documents[i]}, "relevance_score": scores[i]} for i in order]
    return {
        "id": new_id("rerank"),
        "model": model.name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "results": results,
    }


def cosines(vectors: Sequence[Sequence[float]]) -> list[float]:
    """Those of the first vector with each of the others."""
    return [cosine(vectors[0], other) for other in vectors[1:]]


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """The cosine of the angle between two vectors."""
    norms = math.sqrt(sum(x * x for x in a) * sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b)) / norms if norms else 0.0


async def classification(
    http: HttpRequest, body: ClassifyBody, model: Encoder, limits: ServeOptions
) -> dict[str, Any]:
    """The likeliest label of each text and the scores of all, in the order of the model's labels."""
    if model.task is not classify:
        raise wrong_head(model, "/classify")
    examples = [{"text": text} for text in texts_of(body.input, limits)]
    fits = fitting(body, examples, ["input"] * len(examples))
    found, tokens = await run(http, model, examples, limits, fits=fits)
    config = model.model.config
    names = [label_name(config, i) for i in range(config.num_labels)]

    def entry(index: int, labels: Found) -> dict[str, Any]:
        scores = {each["label"]: each["score"] for each in labels}
        return {
            "index": index,
            "label": labels[0]["label"],
            "probs": [scores[name] for name in names],
            "num_classes": config.num_labels,
        }

    def entries() -> Found:
        return [entry(index, each["labels"]) for index, each in enumerate(found)]

    data = await beside_loop(len(found) * len(names), entries)
    return {
        "id": new_id("classify"),
        "object": "list",
        "created": int(time.time()),
        "model": model.name,
        "data": data,
        "usage": usage_of(tokens),
    }


async def prediction(
    http: HttpRequest, body: PredictBody, model: Encoder, limits: ServeOptions
) -> dict[str, Any]:
    """What `fastattn predict --json` prints."""
    given = {"top_k": body.top_k, "no_answer": body.no_answer or None}
    try:
        options = predict.check_options(model.task, given)
    except InputError as error:
        raise ApiError(400, str(error).removeprefix("--").replace("-", "_", 1)) from None
    if len(body.data) > limits.max_inputs:
        raise ApiError(400, f"data: got {len(body.data)}, needs {limits.max_inputs} at most", param="data")
    fields = (*model.task.FIELDS, *model.task.OPTIONAL)
    examples = []
    for number, entry in enumerate(body.data):
        if unknown := entry.keys() - set(fields):
            raise ApiError(400, f"data.{number}: unknown name {min(unknown)[:40]!r}", param="data")
        for name in (*model.task.FIELDS, *(n for n in model.task.OPTIONAL if n in entry)):
            if not entry.get(name, "").strip():
                raise ApiError(400, f'data.{number}: has no text under "{name}"', param="data")
            check_text("data", entry[name])
        examples.append({name: entry[name] for name in fields if name in entry})
    found, _ = await run(http, model, examples, limits, options)
    return {"task": model.task.NAME, "predictions": found}


def tokenize(body: TokenizeBody, model: Decoder | Encoder) -> dict[str, Any]:
    """The ids of a prompt or a conversation."""
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "prompt, messages: needs one of them", param="prompt")
    core = model.tokenizer.core if isinstance(model, Decoder) else model.core
    longest = model.engine.longest if isinstance(model, Decoder) else model.longest
    if body.messages is not None:
        if not isinstance(model, Decoder):
            raise ApiError(400, f"messages: {model.name} reads no conversations", param="messages")
        special = body.add_special_tokens is True  # a template has its own
        ids = dialogue_ids(model, body.messages, body.add_generation_prompt, special)
    else:
        assert body.prompt is not None
        check_text("prompt", body.prompt)
        special = body.add_special_tokens is not False
        ids = list(core.encode(body.prompt, add_special_tokens=special).ids)
    strings = [core.id_to_token(token) for token in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": longest, "tokens": ids, "token_strs": strings}


def wrong_head(model: Encoder, wanted: str) -> ApiError:
    """The error of an endpoint that another head has."""
    return ApiError(
        400,
        f"{model.name} is a model for {model.task.NAME}, which has no {wanted}; use /predict",
        param="model",
    )
