"""Models that also learn from a teacher's logits, for the tasks with labels of tokens or texts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastattn.constants import IGNORE_INDEX
from fastattn.data.corpora import DataError
from fastattn.data.encoding import InputTokenizer
from fastattn.models import (
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    EncoderDecoder,
)
from fastattn.models.head_losses import checked_classes
from fastattn.models.heads import ClassifierOutput, MaskedLMOutput, PreTrainingOutput, QuestionAnsweringOutput
from fastattn.models.losses import mean_loss_of, widened
from fastattn.tasks.training import soft_cross_entropy, soft_loss

FAR = -1e9  # a logit of what takes no part in a softmax, finite at every temperature
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Taught:
    """What models of a task share that may have a teacher: its loss in training is (1 - w) the labels' + w T^2 KL.

    The divergence KL(teacher || model) is the mean over the targets that count, both softened by the temperature T.
    Hinton et al. 2015. The teacher is none of the model's parameters.
    """

    teachers: tuple[Any, ...] = ()  # one at most; a tuple, so that it is no part of the module
    distill_weight = 0.0
    temperature = 1.0

    def learn_from(self, teacher: Any, *, weight: float, temperature: float) -> None:
        """Have a teacher from now on; it is put into eval mode and is never trained."""
        self.teachers = (teacher.eval().requires_grad_(False),)
        self.distill_weight, self.temperature = weight, temperature

    def learns(self, labels: Tensor | None) -> bool:
        """Whether this call's loss has the teacher's part."""
        return bool(
            getattr(self, "training", False) and self.teachers and self.distill_weight and labels is not None
        )

    def teacher_on(self, device: torch.device) -> Any:
        """The teacher, moved to a device."""
        (teacher,) = self.teachers
        return teacher if next(teacher.parameters()).device == device else teacher.to(device)

    def mixed(self, loss: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
        """The whole loss of the labels' loss, and both models' logits (N, classes) of what is labelled."""
        soft = soft_cross_entropy(ours, theirs, self.temperature) if len(ours) else ours.sum()
        return (1 - self.distill_weight) * loss + self.distill_weight * soft


def attach_teacher(
    model: Any,
    tokenizer: InputTokenizer,
    teacher: tuple[Any, InputTokenizer],
    options: Any,
    *lengths: int,
) -> None:
    """Have the model learn from a teacher, whose tokens must be the same.

    lengths: most tokens of a row, and for an encoder-decoder of a target.

    Raises:
        DataError: they are not, a classifier's labels are others, the logits have another width, or the teacher has too
            few positions.
    """
    theirs, their_tokenizer = teacher
    if their_tokenizer.core.get_vocab() != tokenizer.core.get_vocab():
        raise DataError(
            "--teacher: its tokenizer has other tokens than the model's; soft labels need the same ones"
        )
    _check_sizes(model, theirs, tokenizer, lengths)
    if isinstance(model, TaughtTagger):
        labels = theirs.config.labels()
        if odd := sorted(set(labels) ^ set(model.config.labels())):
            raise DataError(f"--teacher: its labels differ from the data's, as {odd[0]!r}")
        model.teacher_order = [labels.index(name) for name in model.config.labels()]
    model.learn_from(theirs, weight=options.distill_weight, temperature=options.temperature)


def _check_sizes(model: Any, teacher: Any, tokenizer: InputTokenizer, lengths: tuple[int, ...]) -> None:
    """Refuse a teacher that lacks an embedding or a position for a row, or whose logits have another width."""
    if isinstance(model, EncoderDecoder):
        sizes = [teacher.config.encoder.vocab_size, teacher.config.decoder.vocab_size]
        positions = [_positions(teacher.config.encoder), teacher.decoder.max_positions]
        written = (teacher.config.decoder.vocab_size, model.config.decoder.vocab_size)
    else:
        sizes, positions = [teacher.config.vocab_size], [_positions(teacher.config)]
        words = isinstance(model, _TaughtWords)
        written = (teacher.config.vocab_size, model.config.vocab_size) if words else (0, 0)
    largest = max(tokenizer.core.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= min(sizes):
        raise DataError(
            f"--teacher: its vocab_size is {min(sizes)}, the model's tokenizer has ids up to {largest}"
        )
    if written[0] != written[1]:
        raise DataError(
            f"--teacher: its vocab_size is {written[0]}, the model's is {written[1]}; soft labels need the same one"
        )
    for limit, length in zip(positions, lengths):
        if limit is not None and limit < length:
            raise DataError(f"--teacher: has {limit} positions, rows of this run have up to {length} tokens")


def _positions(config: Any) -> int | None:
    """Most tokens that an encoder reads; None where any number has positions."""
    positions: int = config.max_position_embeddings - config.position_offset
    return positions if config.positions == "learned" else None


def inputs_for(teacher: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a batch that a teacher takes, whose encoder may lack token types."""
    config = getattr(teacher.config, "encoder", teacher.config)
    names = INPUTS if config.type_vocab_size > 1 else INPUTS[:2]
    return {name: given[name] for name in names if given.get(name) is not None}


class TaughtTagger(Taught, BertForTokenClassification):
    """`BertForTokenClassification` that may have a teacher with the same labels in any order."""

    teacher_order: list[int]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As `BertForTokenClassification.forward`."""
        output: Any = super().forward(*args, **kwargs)
        given = dict(zip(INPUTS, args)) | kwargs
        labels: Any = given.get("labels")
        if not self.learns(labels):
            return output
        counted = (labels != IGNORE_INDEX) & given["attention_mask"].bool()
        teacher = self.teacher_on(labels.device)
        with torch.no_grad():
            theirs = teacher(**inputs_for(teacher, given)).logits[counted][:, self.teacher_order]
        return output._replace(loss=self.mixed(output.loss, output.logits[counted], theirs))


class TaughtAnswerer(Taught, BertForQuestionAnswering):
    """`BertForQuestionAnswering` with both positions as `labels` (B, 2), the answer's first and last token.

    It may have a teacher; both of its distributions over the real tokens of a window are then learnt.
    """

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> QuestionAnsweringOutput:
        """As `BertForQuestionAnswering.forward`."""
        if labels is not None:
            kwargs.update(start_positions=labels[:, 0], end_positions=labels[:, 1])
        output = super().forward(*args, **kwargs)
        if not self.learns(labels):
            return output
        given = dict(zip(INPUTS, args)) | kwargs
        teacher = self.teacher_on(output.start_logits.device)
        with torch.no_grad():
            theirs = teacher(**inputs_for(teacher, given))
        padding = ~given["attention_mask"].bool()
        ours, wanted = (
            torch.cat([x.start_logits, x.end_logits]).masked_fill(torch.cat([padding, padding]), FAR)
            for x in (output, theirs)
        )
        assert output.loss is not None
        return output._replace(loss=self.mixed(output.loss, ours, wanted))


class _TaughtWords(Taught):
    """The masked words of a masked language model: logits exist at these alone, of both models."""

    def taught_words(
        self: Any, given: dict[str, Any], *, first: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The whole loss of the masked words, and if `first` the student's hidden states of first tokens (B, E)."""
        labels = given["labels"]
        encoded = self.bert.encode_tokens(**{name: given.get(name) for name in INPUTS})
        targets = encoded.tokens.pack(labels)
        chosen = (targets != IGNORE_INDEX).nonzero().squeeze(1)
        x, of_first = encoded.at_and_first(chosen) if first else (encoded.at(chosen), None)
        ours = self.decoder(self.head(x))
        teacher = self.teacher_on(labels.device)
        with torch.no_grad():
            seen = teacher.bert.encode_tokens(**inputs_for(teacher, given))
            theirs = teacher.decoder(teacher.head(seen.at(chosen)))
        hard = cross_entropy(widened(ours), targets[chosen])
        return self.mixed(hard, ours, theirs), of_first


class TaughtMaskedLM(_TaughtWords, BertForMaskedLM):
    """`BertForMaskedLM` that may have a teacher."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As `BertForMaskedLM.forward`; with a teacher its training gives the loss alone."""
        given = dict(zip(INPUTS, args)) | kwargs
        if not self.learns(given.get("labels")):
            return super().forward(*args, **kwargs)
        return MaskedLMOutput(self.taught_words(given)[0], None)


class TaughtPreTraining(_TaughtWords, BertForPreTraining):
    """`BertForPreTraining` whose masked words may have a teacher; the next sentence has its labels' loss."""

    second_targets = "next_sentence_label"

    def forward(self, *args: Any, second_weight: Tensor | None = None, **kwargs: Any) -> Any:
        """As `BertForPreTraining.forward`; with a teacher its training gives no logits of words.

        second_weight: what the loss of the next sentence is multiplied by, None for 1.
        """
        follow = kwargs.pop("next_sentence_label", None)
        output = self._of_words(*args, **kwargs)
        if follow is None:
            return output
        targets = checked_classes(
            "next_sentence_label", follow, (output.seq_relationship_logits.shape[0],), 2
        )
        second = mean_loss_of(output.seq_relationship_logits, targets)
        if second_weight is not None:
            second = second * second_weight.to(second.dtype)
        return output._replace(loss=second if output.loss is None else output.loss + second)

    def _of_words(self, *args: Any, **kwargs: Any) -> Any:
        """The output with the loss of the masked words alone."""
        given = dict(zip(INPUTS, args)) | kwargs
        if not self.learns(given.get("labels")):
            return super().forward(*args, **kwargs)
        loss, first = self.taught_words(given, first=True)
        follows = self.seq_relationship(torch.tanh(self.pooler(first)))
        return PreTrainingOutput(loss, None, follows)


class TaughtEncoderDecoder(Taught, EncoderDecoder):
    """`EncoderDecoder` that may have a teacher, which reads the same true tokens of the target."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As `EncoderDecoder.forward`; with a teacher its training keeps the logits."""
        labels = kwargs.get("labels")
        if not self.learns(labels):
            return super().forward(*args, **kwargs)
        output: Any = super().forward(*args, **{**kwargs, "return_logits": True})
        given = dict(zip(INPUTS[:2], args)) | kwargs
        assert labels is not None
        counted = labels != IGNORE_INDEX
        teacher = self.teacher_on(labels.device)
        with torch.no_grad():
            theirs = teacher(**inputs_for(teacher, given), labels=labels, return_logits=True).logits[counted]
        return output._replace(loss=self.mixed(output.loss, output.logits[counted], theirs))


class TaughtClassifier(BertForSequenceClassification):
    """A classifier that also learns from a teacher: forward takes `teacher_logits` (B, num_labels) besides labels.

    loss = (1 - w) * loss of the labels + w * `soft_loss`, with w `distill_weight` and T `temperature`.
    """

    distill_weight = 0.0
    temperature = 1.0

    def forward(self, *args: Any, teacher_logits: Tensor | None = None, **kwargs: Any) -> ClassifierOutput:
        """As `BertForSequenceClassification.forward`."""
        output = super().forward(*args, **kwargs)
        if teacher_logits is None or output.loss is None:
            return output
        soft = soft_loss(output.logits, teacher_logits, self.temperature, self.config.problem_type)
        mixed = (1 - self.distill_weight) * output.loss + self.distill_weight * soft
        return output._replace(loss=mixed)
