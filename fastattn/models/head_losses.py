"""The losses of encoders' heads, and the checks of their labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import torch_compat
from fastattn.constants import IGNORE_INDEX
from fastattn.models.bert_config import PROBLEM_TYPES
from fastattn.models.encoded import Encoded
from fastattn.models.losses import check_targets, mean_loss, mean_loss_of, widened
from fastattn.nn.linear import Linear
from fastattn.nn.unpadding import Tokens
from fastattn.ops.arguments import INTEGER_DTYPES, check_tensor

REGRESSION, SINGLE_LABEL, MULTI_LABEL = PROBLEM_TYPES


def masked_lm(
    encoded: Encoded,
    labels: Tensor | None,
    head: nn.Module,
    decoder: nn.Module,
    keep_logits: bool,
    vocab_size: int,
    *,
    first: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(loss, logits (B, S, V), hidden states of first tokens (B, E)).

    The loss is over labelled tokens; logits are None unless `keep_logits`, and so are first tokens unless `first`.
    """
    tokens = encoded.tokens
    logits = decoder(head(encoded.x)) if keep_logits else None  # (T, V)
    padded = None if logits is None else tokens.pad(logits)
    if labels is None:
        return None, padded, encoded.first() if first else None
    targets = token_targets("labels", labels, tokens, vocab_size)  # (T,)
    if logits is not None:
        return mean_loss_of(logits, targets), padded, encoded.first() if first else None
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        x, of_first = encoded.x, encoded.first() if first else None
    else:
        labelled = (targets != IGNORE_INDEX).nonzero().squeeze(1)
        x, of_first = encoded.at_and_first(labelled) if first else (encoded.at(labelled), None)
        targets = targets.index_select(0, labelled)
    h = head(x)
    if type(decoder) is Linear and not torch_compat.has_hooks(decoder):
        return mean_loss(h, decoder.weight, targets, decoder.bias), None, of_first
    return mean_loss_of(decoder(h), targets), None, of_first


def text_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """The loss of logits (B, num_labels), see `BertForSequenceClassification.forward`."""
    check_tensor("labels", labels)
    batch, num_labels = logits.shape
    if problem_type is None:
        integers = labels.dtype in INTEGER_DTYPES
        problem_type = REGRESSION if num_labels == 1 else SINGLE_LABEL if integers else MULTI_LABEL
    if problem_type == SINGLE_LABEL:
        return mean_loss_of(logits, checked_classes("labels", labels, (batch,), num_labels))
    shapes = [(batch, num_labels), (batch,)] if num_labels == 1 else [(batch, num_labels)]
    if tuple(labels.shape) not in shapes:
        raise ValueError(
            f"labels: got shape {tuple(labels.shape)}, needs {(batch, num_labels)} for {problem_type}"
        )
    wide = widened(logits)
    targets = labels.view(batch, num_labels).to(wide.dtype)
    if problem_type == REGRESSION:
        return F.mse_loss(wide, targets)
    return F.binary_cross_entropy_with_logits(wide, targets)


def token_targets(name: str, labels: Tensor, tokens: Tokens, num_classes: int) -> Tensor:
    """Labels (B, S) of real tokens, (T,) int64; IGNORE_INDEX at padding that is among them."""
    targets = checked_classes(name, labels, (tokens.batch, tokens.seqlen), None)
    if tokens.real is not None and tokens.places is None:
        targets = targets.masked_fill(~tokens.real, IGNORE_INDEX)
    targets = tokens.pack(targets)
    check_targets(name, targets, num_classes, "the number of classes")
    return targets


def checked_classes(name: str, labels: Tensor, shape: tuple[int, ...], num_classes: int | None) -> Tensor:
    check_tensor(name, labels)
    if tuple(labels.shape) != shape or labels.dtype not in INTEGER_DTYPES:
        got = f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise ValueError(f"{name}: got {got}, needs integers of shape {shape}")
    if num_classes is not None:
        check_targets(name, labels, num_classes, "the number of classes")
    return labels.long()


def binary_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropy of logits (T,) over the targets that count; NaN where none does."""
    wide = widened(logits)
    counted = targets != IGNORE_INDEX
    losses = F.binary_cross_entropy_with_logits(wide, targets.clamp(min=0).to(wide.dtype), reduction="none")
    return losses.masked_fill(~counted, 0).sum() / counted.sum()


def position_loss(name: str, logits: Tensor, positions: Tensor) -> Tensor:
    """Mean cross-entropy over the columns of logits (B, S); positions outside are ignored."""
    batch, seqlen = logits.shape
    check_tensor(name, positions)
    if tuple(positions.shape) == (batch, 1):
        positions = positions.squeeze(1)
    targets = checked_classes(name, positions, (batch,), None)
    outside = (targets < 0) | (targets >= seqlen)
    wide = widened(logits)
    # by torch: programs that are recorded for any length have any number of classes here
    return F.cross_entropy(wide, targets.masked_fill(outside, IGNORE_INDEX), ignore_index=IGNORE_INDEX)
