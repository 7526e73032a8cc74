"""/v1/completions and /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse

from fastattn.console import is_unicode
from fastattn.data import DataError
from fastattn.serve.engine import Output
from fastattn.serve.errors import ApiError
from fastattn.serve.generating import Choice, Generation, options_of, room_for
from fastattn.serve.http import EventStream, new_id, unless_gone
from fastattn.serve.json_text import written
from fastattn.serve.metrics import Metrics
from fastattn.serve.options import ServeOptions
from fastattn.serve.schemas import ChatBody, CompletionBody, Message, Sampling
from fastattn.serve.served import Decoder
from fastattn.serve.token_texts import LegacyLogprobs, chat_logprobs

DEFAULT_TOKENS = 16  # of /v1/completions, as in OpenAI's API
Response = Any  # an ASGI application, or the object of an answer


async def completions(
    http: HttpRequest, body: CompletionBody, model: Decoder, limits: ServeOptions, metrics: Metrics
) -> Response:
    """Continue prompts."""
    if body.best_of not in (None, body.n):
        raise ApiError(400, f"best_of: got {body.best_of}, needs n, {body.n}", param="best_of")
    if body.suffix:
        raise ApiError(400, "suffix: is not supported", param="suffix")
    if body.echo and model.encodes:
        raise ApiError(
            400, f"echo: the prompt is what the encoder of {model.name} reads, which its text does not follow",
            param="echo",
        )  # fmt: skip
    check_sampling(body, limits)
    prompts = await run_in_threadpool(prompts_of, body, model, limits)
    constraint = await run_in_threadpool(model.grammars.constraint, body.response_format)
    generation = Generation(model, metrics)

    def add_all() -> list[list[LegacyLogprobs]]:
        for ids, _ in prompts:
            room = room_for(model, ids, body.max_tokens, DEFAULT_TOKENS, limits)
            more: dict[str, Any] = {"copies": body.n, "deadline": time.monotonic() + limits.timeout}
            more["constraint"] = constraint
            if body.logprobs is not None:
                more |= {"scores": body.logprobs, "prompt_scores": body.logprobs if body.echo else None}
            generation.add(ids, options_of(body, model, ids, room), **more)
        if body.logprobs is None:
            return []
        return [
            [
                LegacyLogprobs(
                    model.strings, model.engine.behind(ids), "" if model.encodes else text, body.echo
                )
                for _ in range(body.n)
            ]
            for ids, text in prompts
        ]

    logprobs = await run_in_threadpool(add_all)
    await generation.submit()
    head = {
        "id": new_id("cmpl"),
        "object": "text_completion",
        "created": int(time.time()),
        "model": model.name,
    }

    def choice(number: int, index: int, news: Output | Choice, first: bool) -> dict[str, Any]:
        text, scores = news.text, news.scores
        if first and body.echo:
            text, scores = prompts[number][1] + text, news.prompt_scores + scores
        return {
            "index": number * body.n + index,
            "text": text,
            "logprobs": None if body.logprobs is None else logprobs[number][index].of(scores, body.logprobs),
            "finish_reason": news.finish,
        }

    if body.stream:
        usage = usage_field(body)

        def event(number: int, output: Output, first: bool) -> dict[str, Any]:
            return {**head, "choices": [choice(number, output.index, output, first)], **usage}

        async def events() -> AsyncIterator[dict[str, Any] | str]:
            begun: set[tuple[int, int]] = set()
            async for number, output in generation.outputs():
                asked = (number, output, (number, output.index) not in begun)
                if output.prompt_scores:  # those of a long prompt take a while
                    yield await run_in_threadpool(lambda each: written(event(*each)), asked)
                else:
                    yield event(*asked)
                begun.add((number, output.index))
            if usage:
                yield {**head, "choices": [], "usage": generation.usage()}

        return EventStream(events(), generation.cancel)
    found = await unless_gone(http, generation.all(), generation.cancel)
    if found is None:
        return JSONResponse(None, 499)

    def whole() -> dict[str, Any]:
        choices = [choice(p, i, each, True) for p, row in enumerate(found) for i, each in enumerate(row)]
        return {**head, "choices": choices, "usage": generation.usage()}

    return await run_in_threadpool(whole)


async def chat(
    http: HttpRequest, body: ChatBody, model: Decoder, limits: ServeOptions, metrics: Metrics
) -> Response:
    """Answer a conversation."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs", param="top_logprobs")
    check_sampling(body, limits)
    ids = await run_in_threadpool(dialogue_ids, model, body.messages, True)
    constraint = await run_in_threadpool(model.grammars.constraint, body.response_format)
    asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    generation = Generation(model, metrics)
    room = room_for(model, ids, asked, None, limits)
    top = (body.top_logprobs or 0) if body.logprobs else None
    generation.add(
        ids, options_of(body, model, ids, room), copies=body.n, scores=top, constraint=constraint,
        deadline=time.monotonic() + limits.timeout,
    )  # fmt: skip
    await generation.submit()
    head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": model.name}

    def ending(news: Output | Choice) -> dict[str, Any]:
        scores = None if top is None else chat_logprobs(model.strings, news.scores, top)
        return {"logprobs": scores, "finish_reason": news.finish}

    if body.stream:
        usage = usage_field(body)
        chunk = {**head, "object": "chat.completion.chunk", **usage}

        async def events() -> AsyncIterator[dict[str, Any]]:
            for index in range(body.n):
                role = {"role": "assistant", "content": ""}
                yield {
                    **chunk,
                    "choices": [{"index": index, "delta": role, "logprobs": None, "finish_reason": None}],
                }
            async for _, output in generation.outputs():
                delta = {"content": output.text} if output.text or output.finish is None else {}
                yield {**chunk, "choices": [{"index": output.index, "delta": delta, **ending(output)}]}
            if usage:
                yield {**chunk, "choices": [], "usage": generation.usage()}

        return EventStream(events(), generation.cancel)
    found = await unless_gone(http, generation.all(), generation.cancel)
    if found is None:
        return JSONResponse(None, 499)

    def whole() -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": each.text, "refusal": None},
                **ending(each),
            }
            for index, each in enumerate(found[0])
        ]
        return {**head, "object": "chat.completion", "choices": choices, "usage": generation.usage()}

    return await run_in_threadpool(whole)


def usage_field(body: Sampling) -> dict[str, None]:
    """What every chunk of a stream holds where the last one is to have the usage."""
    asked = body.stream_options is not None and body.stream_options.include_usage
    return {"usage": None} if asked else {}


def check_sampling(body: Sampling, limits: ServeOptions) -> None:
    """Limits that depend on the server."""
    if body.n > limits.max_batch:
        raise ApiError(400, f"n: got {body.n}, needs {limits.max_batch} at most", param="n")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: needs stream", param="stream_options")
    if body.response_format is not None:
        for name in ("ignore_eos", "min_tokens", "no_repeat_ngram_size"):
            if getattr(body, name):
                raise ApiError(400, f"{name}: does not go with response_format", param=name)
    if body.min_tokens and body.stop:
        message = "min_tokens: does not go with stop, which may end a text before"
        raise ApiError(400, message, param="min_tokens")
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if not all(stops):
        raise ApiError(400, "stop: got an empty text", param="stop")


def prompts_of(body: CompletionBody, model: Decoder, limits: ServeOptions) -> list[tuple[list[int], str]]:
    """The ids and the text of each prompt."""
    given: Any = body.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    most = max(limits.max_inputs // body.n, 1)
    if not given or len(given) > most:
        each = f" with n of {body.n}" if body.n > 1 else ""
        raise ApiError(400, f"prompt: got {len(given)}, needs 1 to {most}{each}", param="prompt")
    return [_prompt(each, model) for each in given]


def _prompt(given: str | list[int], model: Decoder) -> tuple[list[int], str]:
    if isinstance(given, str):
        check_text("prompt", given)
        ids = list(model.tokenizer.core.encode(given).ids)
        text = given
    else:
        ids = list(given)
        size = model.engine.vocab_size
        if not all(0 <= token < size for token in ids):
            raise ApiError(400, f"prompt: needs token ids from 0 to {size - 1}", param="prompt")
        text = model.tokenizer.decode(ids)
    if not ids:
        raise ApiError(400, "prompt: has no token, needs one at least", param="prompt")
    return ids, text


def dialogue_ids(
    model: Decoder, messages: Sequence[Message], add_generation_prompt: bool, add_special_tokens: bool = False
) -> list[int]:
    """The ids of a conversation by the tokenizer's template, which has the special tokens; ApiError 400 where there is
    none."""
    if model.template is None:
        raise ApiError(
            400,
            f"The tokenizer of {model.name} has no chat template, so it reads no conversations; use /v1/completions",
            param="messages",
            code="no_chat_template",
        )
    plain = [message.plain() for message in messages]
    for message in plain:
        for text in message.values():
            check_text("messages", text)
    try:
        text = model.template.render(plain, add_generation_prompt=add_generation_prompt)
    except DataError as error:
        raise ApiError(400, str(error), param="messages") from None
    ids = list(model.tokenizer.core.encode(text, add_special_tokens=add_special_tokens).ids)
    if not ids:
        raise ApiError(400, "messages: the template makes no token of them", param="messages")
    return ids


def check_text(name: str, text: str) -> None:
    """ApiError for characters that are no text."""
    if not is_unicode(text):
        raise ApiError(400, f"{name}: holds characters that are no text", param=name)
