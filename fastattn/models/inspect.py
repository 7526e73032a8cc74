"""Attribution of a classifier's logit to tokens: integrated gradients of the embeddings, with captum."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.nn.modes import evaluating
from fastattn.ops.arguments import INTEGER_DTYPES, check_tensor, is_integer

INSTALL = "pip install 'fastattn[inspect]'"


class Attribution(NamedTuple):
    """The share of each token in a classifier's logit.

    Attributes:
        scores: (B, S), 0 at padding; a row adds up to logit - baseline.
        target: (B,) int64, the class explained.
        logit: (B,), the model's for that class.
        baseline: (B,), the same without the tokens' embeddings.
    """

    scores: Tensor
    target: Tensor
    logit: Tensor
    baseline: Tensor


def attribute(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    *,
    target: int | Tensor | None = None,
    n_steps: int = 50,
    batch_size: int = 64,
) -> Attribution:
    """Integrated gradients of a class's logit: token embeddings grow from 0 to what they are, all positions in place.

    score[t] = sum over the width of e[t] * (the mean over a in 0..1 of d logit(a e) / d e[t]), by Gauss-Legendre
    quadrature. Scores add up to logit - baseline but for the quadrature's error, which falls with `n_steps`.
    Sundararajan, Taly & Yan 2017.

    Args:
        model: `BertForSequenceClassification`; it is put in eval mode for the call, its gradients are left alone.
        input_ids, attention_mask, token_type_ids: (B, S), as in the model's forward.
        target: the class to explain, one for all or (B,); the likeliest by default.
        n_steps: points of the quadrature.
        batch_size: sequences at a time, at least B.

    Raises:
        ImportError: captum is not installed.
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    from fastattn.models.heads import BertForSequenceClassification

    if not isinstance(model, BertForSequenceClassification):
        raise TypeError(f"model: got {type(model).__name__}, needs a BertForSequenceClassification")
    check_tensor("input_ids", input_ids)
    for name, number in (("n_steps", n_steps), ("batch_size", batch_size)):
        if not is_integer(number) or number < 1:
            raise ValueError(f"{name}: got {number!r}, needs a positive integer")
    with evaluating(model):
        with torch.no_grad():
            logits = model(input_ids, attention_mask, token_type_ids).logits  # (B, num_labels)
        classes = _classes(target, logits)
        integrated = _integrated_gradients()
        real = torch.ones_like(input_ids) if attention_mask is None else (attention_mask != 0).long()
        pad = model.config.pad_token_id or 0
        with torch.no_grad():  # what padding holds is not looked at
            embeds = model.bert.embeddings.word_embeddings(input_ids.masked_fill(real == 0, pad))  # (B, S, E)
        positions = _positions(model, input_ids, real)

        def forward(given: Tensor, mask: Tensor, types: Tensor | None, places: Tensor) -> Tensor:
            found: Tensor = model(None, mask, types, places, given).logits
            return found

        with torch.enable_grad():
            scores = integrated(forward, multiply_by_inputs=True).attribute(
                embeds,
                baselines=0.0,
                target=classes,
                additional_forward_args=(real, token_type_ids, positions),
                n_steps=n_steps,
                method="gausslegendre",
                internal_batch_size=max(batch_size, len(input_ids)),
            )
        with torch.no_grad():
            without = forward(torch.zeros_like(embeds), real, token_type_ids, positions)
    rows = torch.arange(len(classes), device=classes.device)
    summed = scores.sum(-1).masked_fill(real == 0, 0).to(logits.dtype)
    return Attribution(summed, classes, logits[rows, classes], without[rows, classes])


def _integrated_gradients() -> Any:
    try:
        from captum.attr import IntegratedGradients
    except ImportError:
        raise ImportError(f"attribution needs captum: {INSTALL}") from None
    return IntegratedGradients


def _classes(target: int | Tensor | None, logits: Tensor) -> Tensor:
    batch, count = logits.shape
    if target is None:
        return logits.argmax(-1)
    if isinstance(target, Tensor):
        if tuple(target.shape) != (batch,) or target.dtype not in INTEGER_DTYPES:
            got = f"{target.dtype} of shape {tuple(target.shape)}"
            raise ValueError(f"target: got {got}, needs integers of shape {(batch,)}")
        classes = target.to(logits.device).long()
    elif is_integer(target):
        classes = torch.full((batch,), target, dtype=torch.long, device=logits.device)
    else:
        raise TypeError(f"target: got {type(target).__name__}, needs an integer, a tensor or None")
    if batch and not 0 <= int(classes.min()) <= int(classes.max()) < count:
        raise ValueError(f"target: got {target}, needs classes from 0 to {count - 1}")
    return classes


def _positions(model: Any, input_ids: Tensor, real: Tensor) -> Tensor:
    """Positions (B, S) that the model would compute from the ids, as it gets embeddings instead of ids."""
    batch, seqlen = input_ids.shape
    pad = model.config.pad_token_id or 0
    found: Tensor = model.bert._positions(
        input_ids.masked_fill(real == 0, pad), batch, seqlen, device=input_ids.device
    )
    return found.expand(batch, seqlen)
