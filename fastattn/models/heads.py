"""Heads of encoders: masked words, next sentences, classes of texts and of tokens, and answers.

Every head works on real tokens in a row and pads its results at the end. A loss counts real tokens only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastattn.models.bert_config import BertConfig
from fastattn.models.encoder import Bert, initialise
from fastattn.models.head_losses import (
    binary_loss,
    checked_classes,
    masked_lm,
    position_loss,
    text_loss,
    token_targets,
)
from fastattn.models.losses import mean_loss_of
from fastattn.models.pretrained import PretrainedEncoder
from fastattn.nn.blocks import Transform
from fastattn.nn.dropout import Dropout
from fastattn.nn.linear import Linear


class MaskedLMOutput(NamedTuple):
    """The output of a masked language model.

    Attributes:
        loss: () in float32 at least, None without labels; NaN where no label counts.
        logits: (B, S, V), 0 at padding; None in training, see `BertForMaskedLM.forward`.
        hidden_states: as in `fastattn.models.encoder.EncoderOutput`.
        attentions: the same.
    """

    loss: Tensor | None
    logits: Tensor | None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class PreTrainingOutput(NamedTuple):
    """The output of BERT's two pre-training heads.

    Attributes:
        loss: () in float32 at least, the sum over the heads that have labels; None without.
        prediction_logits: (B, S, V), as `MaskedLMOutput.logits`.
        seq_relationship_logits: (B, 2): the second sentence follows the first; it does not.
        hidden_states: as in `fastattn.models.encoder.EncoderOutput`.
        attentions: the same.
    """

    loss: Tensor | None
    prediction_logits: Tensor | None
    seq_relationship_logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    @property
    def logits(self) -> Tensor | None:
        """prediction_logits."""
        return self.prediction_logits


class ClassifierOutput(NamedTuple):
    """The output of a classifier of texts or tokens.

    Attributes:
        loss: () in float32 at least, None without labels; NaN where no label counts.
        logits: (B, num_labels) for texts; (B, S, num_labels), or (B, S) with one label, for tokens, 0 at padding.
        hidden_states: as in `fastattn.models.encoder.EncoderOutput`.
        attentions: the same.
    """

    loss: Tensor | None
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class QuestionAnsweringOutput(NamedTuple):
    """Where an answer starts and ends.

    Attributes:
        loss: () in float32 at least, None without positions; NaN where no position counts.
        start_logits: (B, S), the lowest finite number at padding, which takes no part in a softmax.
        end_logits: the same.
        hidden_states: as in `fastattn.models.encoder.EncoderOutput`.
        attentions: the same.
    """

    loss: Tensor | None
    start_logits: Tensor
    end_logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    @property
    def logits(self) -> Tensor:
        """Both, (B, S, 2)."""
        return torch.stack((self.start_logits, self.end_logits), dim=-1)


class BertForMaskedLM(PretrainedEncoder, nn.Module):
    """A masked language model: an encoder, a dense layer with activation and norm, and a linear output layer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = Bert(config, add_pooler=False)
        self.head = lm_transform(config)
        self.decoder = Linear(config.embedding_dim, config.vocab_size, bias=config.decoder_bias)
        initialise(self.head, config)
        initialise(self.decoder, config)
        self.tie_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_logits: bool | None = None,
    ) -> MaskedLMOutput:
        """Logits of every token, and the mean cross-entropy at the labels.

        Args:
            labels: (B, S) integers, the words that were masked, -100 elsewhere; padding is ignored. Without
                return_logits the loss computes logits of labelled tokens only.
            return_logits: whether to compute all logits. None = not where a model in training mode makes a loss with
                gradients.
            Others: as in `Bert.forward`, with its errors. Labels that do not fit are a TypeError or ValueError, too.
        """
        keep = _wants_logits(self, labels, return_logits)
        encoded = self.bert.encode_tokens(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            output_hidden_states=output_hidden_states, output_attentions=output_attentions,
        )  # fmt: skip
        loss, logits, _ = masked_lm(encoded, labels, self.head, self.decoder, keep, self.config.vocab_size)
        return MaskedLMOutput(loss, logits, encoded.hidden_states, encoded.attentions)

    def tie_weights(self) -> None:
        """Tie the output to the token embedding if the config asks for it."""
        _tie(self)


class BertForPreTraining(PretrainedEncoder, nn.Module):
    """BERT with both pre-training heads: `BertForMaskedLM`'s, and next sentence prediction."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = Bert(config, add_pooler=False)
        self.pooler = Linear(config.hidden_size, config.hidden_size)
        self.head = lm_transform(config)
        self.decoder = Linear(config.embedding_dim, config.vocab_size, bias=config.decoder_bias)
        self.seq_relationship = Linear(config.hidden_size, 2)
        for module in (self.pooler, self.head, self.decoder, self.seq_relationship):
            initialise(module, config)
        self.tie_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_logits: bool | None = None,
    ) -> PreTrainingOutput:
        """Logits of both heads, and the sum of the losses of heads that have labels.

        Args:
            labels: as in `BertForMaskedLM.forward`.
            next_sentence_label: (B,) integers, 0 = the second sentence follows the first, 1 = it does not.
            return_logits: as in `BertForMaskedLM.forward`.
            Others: as in `Bert.forward`, with its errors. Labels that do not fit are a TypeError or ValueError, too.
        """
        keep = _wants_logits(self, labels, return_logits)
        encoded = self.bert.encode_tokens(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            output_hidden_states=output_hidden_states, output_attentions=output_attentions,
        )  # fmt: skip
        loss, logits, first = masked_lm(
            encoded, labels, self.head, self.decoder, keep, self.config.vocab_size, first=True
        )
        follows = self.seq_relationship(torch.tanh(self.pooler(first)))  # (B, 2)
        if next_sentence_label is not None:
            targets = checked_classes("next_sentence_label", next_sentence_label, (follows.shape[0],), 2)
            of_next = mean_loss_of(follows, targets)
            loss = of_next if loss is None else loss + of_next
        return PreTrainingOutput(loss, logits, follows, encoded.hidden_states, encoded.attentions)

    def tie_weights(self) -> None:
        """Tie the output to the token embedding if the config asks for it."""
        _tie(self)


class BertForSequenceClassification(PretrainedEncoder, nn.Module):
    """Classification or regression of texts: the first token or the mean of all, a dense layer, a linear layer."""

    new_heads = ("head.*", "classifier.*")

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = Bert(config, add_pooler=False)
        self.head = class_transform(config)
        self.input_dropout = Dropout(_dropout(config) if config.classifier_input_dropout else 0.0)
        self.dropout = Dropout(_dropout(config))
        self.classifier = Linear(config.hidden_size, config.num_labels or 0)
        initialise(self.head, config)
        initialise(self.classifier, config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> ClassifierOutput:
        """Logits of each text (B, num_labels), and a loss by `config.problem_type`.

        Args:
            labels: for a single label, (B,) integers, -100 is ignored: cross-entropy. For several labels,
                (B, num_labels) of 0 and 1: binary cross-entropy. For regression, (B,) or (B, num_labels) floats: mean
                squared error. Where problem_type is None: regression if num_labels is 1, else a single label if the
                labels are integers, else several.
            Others: as in `Bert.forward`, with its errors. Labels that do not fit are a TypeError or ValueError, too.
        """
        encoded = self.bert.encode_tokens(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            output_hidden_states=output_hidden_states, output_attentions=output_attentions,
        )  # fmt: skip
        cls = self.config.classifier_pooling == "cls"
        pooled = encoded.first() if cls else encoded.tokens.mean(encoded.x)  # (B, E)
        logits = self.classifier(self.dropout(self.head(self.input_dropout(pooled))))  # (B, num_labels)
        loss = None if labels is None else text_loss(logits, labels, self.config.problem_type)
        return ClassifierOutput(loss, logits, encoded.hidden_states, encoded.attentions)


class BertForTokenClassification(PretrainedEncoder, nn.Module):
    """Classification of tokens, such as entities; with one label a binary decision (ELECTRA's discriminator)."""

    new_heads = ("head.*", "classifier.*")

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = Bert(config, add_pooler=False)
        self.head = class_transform(config) if config.token_dense else nn.Identity()
        self.dropout = Dropout(_dropout(config) if config.token_dropout is None else config.token_dropout)
        self.classifier = Linear(config.hidden_size, config.num_labels or 0)
        initialise(self.head, config)
        initialise(self.classifier, config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> ClassifierOutput:
        """Logits of each token (B, S, num_labels), or (B, S) with one label, and a mean loss over real tokens.

        Args:
            labels: (B, S) integers, classes: cross-entropy; with one label 0 or 1: binary cross-entropy. -100 and
                padding are ignored.
            Others: as in `Bert.forward`, with its errors. Labels that do not fit are a TypeError or ValueError, too.
        """
        encoded = self.bert.encode_tokens(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            output_hidden_states=output_hidden_states, output_attentions=output_attentions,
        )  # fmt: skip
        tokens = encoded.tokens
        logits = self.classifier(self.dropout(self.head(encoded.x)))  # (T, num_labels)
        binary = self.config.num_labels == 1
        if binary:
            logits = logits.squeeze(-1)  # (T,)
        loss = None
        if labels is not None:
            targets = token_targets("labels", labels, tokens, 2 if binary else logits.shape[-1])
            loss = binary_loss(logits, targets) if binary else mean_loss_of(logits, targets)
        return ClassifierOutput(loss, tokens.pad(logits), encoded.hidden_states, encoded.attentions)


class BertForQuestionAnswering(PretrainedEncoder, nn.Module):
    """Extractive question answering: logits of each token to be the first and the last of the answer."""

    new_heads = ("head.*", "qa_outputs.*")

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = Bert(config, add_pooler=False)
        self.head = class_transform(config) if config.qa_dense else nn.Identity()
        self.dropout = Dropout(_dropout(config) if config.qa_dropout is None else config.qa_dropout)
        self.qa_outputs = Linear(config.hidden_size, 2)
        initialise(self.head, config)
        initialise(self.qa_outputs, config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> QuestionAnsweringOutput:
        """Logits of each token to start and to end the answer, (B, S) each, and the mean of both cross-entropies.

        Args:
            start_positions, end_positions: columns, (B,) or (B, 1) integers, given together; one outside of
                0 .. S - 1 is ignored. The softmax is over real tokens.
            Others: as in `Bert.forward`, with its errors. Positions that do not fit are a TypeError or ValueError, too.
        """
        if (start_positions is None) != (end_positions is None):
            raise ValueError("start_positions: needs end_positions beside it, got one of them")
        encoded = self.bert.encode_tokens(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            output_hidden_states=output_hidden_states, output_attentions=output_attentions,
        )  # fmt: skip
        logits = self.qa_outputs(self.dropout(self.head(encoded.x)))  # (T, 2)
        padded = encoded.tokens.pad(logits, torch.finfo(logits.dtype).min)  # (B, S, 2)
        start, end = padded.unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            losses = [
                position_loss(name, at, given)
                for name, at, given in (
                    ("start_positions", start, start_positions), ("end_positions", end, end_positions),
                )
            ]  # fmt: skip
            loss = (losses[0] + losses[1]) / 2
        return QuestionAnsweringOutput(loss, start, end, encoded.hidden_states, encoded.attentions)


def class_transform(config: BertConfig) -> Transform:
    """The dense layer in front of a classifier."""
    width = config.hidden_size
    norm = nn.LayerNorm(width, eps=config.layer_norm_eps, bias=config.norm_bias)
    return Transform(
        width, width, activation=config.classifier_activation, bias=config.classifier_bias,
        norm=norm if config.classifier_norm else None,
    )  # fmt: skip


def lm_transform(config: BertConfig) -> Transform:
    """The dense layer in front of a masked LM's output."""
    width = config.embedding_dim
    return Transform(
        config.hidden_size, width, activation=config.lm_activation or config.hidden_act, bias=config.lm_bias,
        norm=nn.LayerNorm(width, eps=config.layer_norm_eps, bias=config.norm_bias),
    )  # fmt: skip


def _tie(model: BertForMaskedLM | BertForPreTraining) -> None:
    if model.config.tie_word_embeddings:
        model.decoder.weight = model.bert.embeddings.word_embeddings.weight


def _wants_logits(model: nn.Module, labels: Tensor | None, return_logits: bool | None) -> bool:
    if return_logits is None:
        return labels is None or not (model.training and torch.is_grad_enabled())
    if not isinstance(return_logits, bool):
        raise TypeError(f"return_logits: got {return_logits!r}, needs True, False or None")
    return return_logits


def _dropout(config: BertConfig) -> float:
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
