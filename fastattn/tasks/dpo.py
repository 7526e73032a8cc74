"""Direct preference optimisation (DPO): raises the log-ratio of the chosen to the rejected answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.constants import IGNORE_INDEX
from fastattn.data.best_fit import best_fit
from fastattn.data.chat import ASSISTANT, DEFAULT_TEMPLATE, ChatTemplate
from fastattn.data.corpora import DataError
from fastattn.data.packing import PADDING_SEGMENT
from fastattn.data.records import Record, check_unicode, contents, required, text_of
from fastattn.data.tokenization import Tokenizer
from fastattn.evaluation.report import Report
from fastattn.models import GPT, GPTConfig
from fastattn.models.decoder import CausalLMOutput
from fastattn.models.fields import or_none, positive, size
from fastattn.nn.modes import evaluating
from fastattn.tasks import causal_lm
from fastattn.tasks.chat import ends_of
from fastattn.tasks.logprobs import next_targets, token_losses
from fastattn.tasks.options import CheckedOptions, part
from fastattn.tasks.perplexity import bos_of, template_front
from fastattn.tasks.preferences import ANSWERS, answer_of, shared_messages

NAME = "dpo"
MODELS = (GPT,)
FIELDS = ("prompt",)
OPTIONAL: tuple[str, ...] = ()
LABELS = ANSWERS
TEXTS = ("prompt", "chosen", "rejected")  # what cleaning reads
NEW_PARTS: tuple[str, ...] = ()
CHANGES_TOKENIZER = True  # prompts in messages are rendered by a chat template
DEFAULTS = {"max_epochs": 1.0, "batch_size": 8, "lr": 1e-5, "min_lr_ratio": 0.0, "weight_decay": 0.0}
BATCH_SIZE = 8


@dataclass(frozen=True)
class Options(CheckedOptions):
    """Options of the DPO loss.

    Args:
        max_length: most tokens of a prompt with an answer; first the prompt is truncated at its beginning, after its
            BOS, then the answer at its end. None for 1024, or fewer where the model has fewer positions.
        beta: of the loss; a smaller one lets the model differ more from the reference.
        label_smoothing: probability that chosen and rejected are swapped.
    """

    max_length: int | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0

    CHECKS = {"max_length": or_none(size), "beta": positive, "label_smoothing": part}  # noqa: RUF012


@dataclass(frozen=True)
class Example:
    """A prompt, the chosen answer and the rejected one; a prompt is a text or a list of messages."""

    where: str
    prompt: str | tuple[dict[str, Any], ...]
    chosen: str
    rejected: str


class Pair(NamedTuple):
    """Tokens of a prompt with each answer, and how many of them are the prompt's."""

    chosen: list[int]
    rejected: list[int]
    prompts: tuple[int, int]


class PreferenceOutput(NamedTuple):
    """The loss of a batch of pairs, and the margin of each: its log-ratio minus the reference's, times beta."""

    loss: Tensor  # ()
    margins: Tensor  # (B,)


def examples_of(records: Sequence[Record], options: Options) -> list[Example]:
    """The examples of records with "prompt", "chosen" and "rejected".

    Each is a text or a list of messages. Of an answer in messages the last one is used, which must be the assistant's.
    Without a prompt, it is the messages that both conversations begin with, as TRL reads them.

    Raises:
        DataError: a record lacks one of them, or both answers are the same; with file and line.
    """
    made = []
    for record in records:
        prompt = shared_messages(record) if "prompt" not in record.fields else required(record, "prompt")
        if isinstance(prompt, list):
            good = [isinstance(m, dict) and isinstance(m.get("role"), str) for m in prompt]
            if not prompt or not all(good) or not all(isinstance(m.get("content"), str) for m in prompt):
                raise DataError(f'{record.where}: prompt is not a list of messages with "role" and "content"')
            for number, message in enumerate(prompt, 1):
                check_unicode(record.where, f"message {number}", message["role"] + message["content"])
            prompt = tuple(prompt)
        else:
            prompt = text_of(record, "prompt")
        chosen, rejected = (answer_of(record, name) for name in ANSWERS)
        if chosen == rejected:
            raise DataError(f"{record.where}: chosen and rejected are the same, needs two different answers")
        made.append(Example(record.where, prompt, chosen, rejected))
    return made


def group_of(record: Record) -> str:
    """The key of a pair's prompt: pairs with the same prompt stay together where data is split."""
    return contents(record, FIELDS if record.fields.get("prompt") is not None else LABELS)


def labels_in(examples: Sequence[Example]) -> None:
    """None: preferences have no labels."""


def check_examples(examples: Sequence[Example]) -> None:
    """Accept all examples; `examples_of` has checked them."""


def best(examples: Sequence[Example]) -> tuple[str, bool]:
    """The metric that selects the best model, and whether higher is better."""
    return "loss", False


class PreferenceGPT(GPT):
    """A `GPT` that also takes packed pairs of answers and returns the loss of Rafailov et al. 2023, equation 7.

    loss = -ln sigmoid(margin) (1 - e) - ln sigmoid(-margin) e, the mean over pairs, e the label smoothing and
    margin = beta ((ln P(chosen) - ln P(rejected)) - the same of the reference).
    """

    beta = 0.1
    label_smoothing = 0.0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As `GPT.forward`; with `targets` and `segment_ids` of packed answers and labels, the loss of pairs.

        Args:
            input_ids: (R, S) prompts with answers, packed.
            targets: (R, S), the answers' tokens at their positions, -100 elsewhere.
            segment_ids: (R, S), 2 i for pair i's chosen answer and 2 i + 1 for the rejected one; negative is padding.
            labels: (B,) float, for each pair ln P(chosen) - ln P(rejected) under the reference.
        """
        targets = kwargs.pop("targets", None)
        if targets is None:
            return super().forward(*args, **kwargs)
        ids, segment_ids, start = (
            args[0] if args else kwargs["input_ids"],
            kwargs["segment_ids"],
            kwargs["labels"],
        )
        difference = answer_logprobs(self, super().forward, ids, targets, segment_ids, 2 * len(start))
        margins = self.beta * (difference[0::2] - difference[1::2] - start)
        wrong = self.label_smoothing
        losses = -(1 - wrong) * F.logsigmoid(margins) - wrong * F.logsigmoid(-margins)
        return PreferenceOutput(losses.mean(), margins.detach())


def answer_logprobs(
    model: Any, forward: Any, ids: Tensor, targets: Tensor, segment_ids: Tensor, count: int
) -> Tensor:
    """ln P of each of `count` answers given its prompt, (count,): the sum over the answer's tokens in `targets`."""
    output: CausalLMOutput = forward(ids, segment_ids=segment_ids, return_logits=False)
    following = next_targets(targets, segment_ids)
    counted = following != IGNORE_INDEX
    losses = token_losses(model, output.last_hidden_state[counted], following[counted])
    return losses.new_zeros(count).index_add(0, segment_ids[counted].long(), -losses)


def new_model(
    source: Path | str | GPTConfig, examples: Sequence[Example], options: Options, tokenizer: Tokenizer
) -> PreferenceGPT:
    """The folder's model, whose initial weights are also the reference. It trains without the dropout of its config,
    as the reference has none.

    Raises:
        DataError: the source is a config, while DPO starts from a trained model.
    """
    if isinstance(source, GPTConfig):
        raise DataError("--model: got a preset's name, dpo needs the folder of a trained model")
    set_template(tokenizer, examples)
    model = PreferenceGPT.from_pretrained(source, dtype=torch.float32).train()
    module: Any
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):  # of attention weights
            module.dropout = 0.0
    model.beta, model.label_smoothing = options.beta, options.label_smoothing
    return model


def set_template(tokenizer: Tokenizer, examples: Sequence[Example]) -> None:
    """Give a tokenizer without a chat template one where prompts are messages; the run saves it."""
    if tokenizer.chat_template is None and any(not isinstance(e.prompt, str) for e in examples):
        tokenizer.chat_template = DEFAULT_TEMPLATE


class Preferences:
    """Pairs with their log-probabilities under the reference, as items; `collate` packs their answers into rows.

    Attributes:
        cut, cut_rows: the number of truncated tokens, and of answers with any.
    """

    def __init__(self, pairs: Sequence[Pair], start: Sequence[float], *, length: int, pad_id: int) -> None:
        self.pairs, self.start = pairs, start
        self.length, self.pad_id = length, pad_id
        self.cut = self.cut_rows = 0

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Pair, float]:
        return self.pairs[index], self.start[index]

    def collate(self, items: Sequence[tuple[Pair, float]]) -> dict[str, Tensor]:
        """input_ids, targets and segment_ids (R, S), and labels (B,): see `PreferenceGPT.forward`."""
        batch = packed([pair for pair, _ in items], self.length, self.pad_id)
        batch["labels"] = torch.tensor([start for _, start in items], dtype=torch.float32, device="cpu")
        return batch


def packed(pairs: Sequence[Pair], length: int, pad_id: int) -> dict[str, Tensor]:
    """The answers of pairs after their prompts, in rows of at most `length` tokens by best fit."""
    sequences = [ids for pair in pairs for ids in (pair.chosen, pair.rejected)]
    prompts = [prompt for pair in pairs for prompt in pair.prompts]
    placed, begins = best_fit([len(ids) for ids in sequences], length)
    rows = [placed[a:b].tolist() for a, b in pairwise(begins)]
    width = max(sum(len(sequences[i]) for i in row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, device="cpu")
    targets = torch.full_like(ids, IGNORE_INDEX)
    segments = torch.full_like(ids, PADDING_SEGMENT)
    for number, row in enumerate(rows):
        at = 0
        for i in row:
            end = at + len(sequences[i])
            ids[number, at:end] = torch.tensor(sequences[i], device="cpu")
            targets[number, at + prompts[i] : end] = ids[number, at + prompts[i] : end]
            segments[number, at:end] = i
            at = end
    return {"input_ids": ids, "targets": targets, "segment_ids": segments}


def training_set(
    model: Any, tokenizer: Tokenizer, examples: Sequence[Example], options: Options
) -> Preferences:
    """The examples as items, with their log-probabilities under the model as it is now, the reference.

    Raises:
        DataError: no pair has two different answers within the limit.
    """
    length = causal_lm.block_length(model, options)
    pairs, cut, cut_rows = pairs_of(model, tokenizer, examples, length)
    if all(pair.chosen == pair.rejected for pair in pairs):
        raise DataError(
            f"data: within {length} tokens no pair has two different answers, needs a larger task.max_length"
        )
    chosen, rejected = logprobs(model, pairs, length, tokenizer.pad_id, BATCH_SIZE)
    data = Preferences(pairs, (chosen - rejected).tolist(), length=length, pad_id=tokenizer.pad_id)
    data.cut, data.cut_rows = cut, cut_rows
    return data


def pairs_of(
    model: Any, tokenizer: Tokenizer, examples: Sequence[Example], length: int
) -> tuple[list[Pair], int, int]:
    """The tokens of each example, the number of truncated tokens, and of answers with any.

    A chat template, if there is one, renders prompt and answer; otherwise the answer follows the prompt directly. Both
    answers end with the end-of-text token.
    """
    set_template(tokenizer, examples)
    template = None if tokenizer.chat_template is None else ChatTemplate.of(tokenizer)
    front, bos = template_front(tokenizer), bos_of(model, tokenizer)
    ends = ends_of(model, tokenizer)
    pairs = []
    cut = cut_rows = 0
    for example in examples:
        answers, prompts = [], []
        for answer in (example.chosen, example.rejected):
            prompt, said = _tokens(tokenizer, template, example, answer, ends)
            if front and prompt[: len(front)] != front:
                prompt = [*front, *prompt]
            if not prompt:
                raise DataError(f"{example.where}: the prompt has no token")
            over = max(0, len(prompt) + len(said) - length)
            first = max(len(front), prompt[0] == bos)
            first = first if first < len(prompt) else 0
            kept = [*prompt[:first], *prompt[min(first + over, len(prompt) - 1) :]]
            answers.append([*kept, *said][:length])
            prompts.append(len(kept))
            cut, cut_rows = cut + over, cut_rows + (over > 0)
        pairs.append(Pair(answers[0], answers[1], (prompts[0], prompts[1])))
    return pairs, cut, cut_rows


@torch.no_grad()
def logprobs(
    model: Any, pairs: Sequence[Pair], length: int, pad_id: int, batch_size: int
) -> tuple[Tensor, Tensor]:
    """ln P of the chosen and of the rejected answer of each pair, (N,) float64 each; the model in eval mode."""
    device = next(model.parameters()).device
    found = []
    with evaluating(model):
        for start in range(0, len(pairs), batch_size):
            part_of = pairs[start : start + batch_size]
            batch = {name: value.to(device) for name, value in packed(part_of, length, pad_id).items()}
            found.append(
                answer_logprobs(
                    model, model, batch["input_ids"], batch["targets"], batch["segment_ids"], 2 * len(part_of)
                )
            )
    both = torch.cat(found).double().cpu()
    return both[0::2], both[1::2]


def evaluate(
    model: Any,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    batch_size: int = BATCH_SIZE,
    options: Options | None = None,
) -> Report:
    """accuracy: the share of pairs whose chosen answer the model gives the higher probability; ties count half.

    margin is the mean of ln P(chosen) - ln P(rejected) in nats, and chosen_logprob and rejected_logprob the means of
    both.
    """
    length = causal_lm.block_length(model, options or Options())
    pairs, _, _ = pairs_of(model, tokenizer, examples, length)
    chosen, rejected = logprobs(model, pairs, length, tokenizer.pad_id, batch_size)
    right = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
    return Report(
        metrics={
            "accuracy": float(right.mean()),
            "margin": float((chosen - rejected).mean()),
            "chosen_logprob": float(chosen.mean()),
            "rejected_logprob": float(rejected.mean()),
        },
        count=len(pairs),
    )


def _tokens(
    tokenizer: Tokenizer, template: ChatTemplate | None, example: Example, answer: str, ends: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The tokens of the prompt and those of the answer."""
    if template is None:
        return tokenizer.encode(str(example.prompt)), [*tokenizer.encode(answer), tokenizer.eos_id]
    prompt = example.prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    try:
        before = template.render(messages, add_generation_prompt=True)
        whole = template.render([*messages, {"role": ASSISTANT, "content": answer}])
    except DataError as error:
        raise DataError(f"{example.where}: {error}") from None
    if not whole.startswith(before):
        raise DataError(f"{example.where}: the chat template renders the prompt differently before an answer")
    said = tokenizer.encode(whole[len(before) :])
    stops = [i for i, token in enumerate(said) if token in ends]
    return tokenizer.encode(before), said[: stops[-1] + 1] if stops else said
